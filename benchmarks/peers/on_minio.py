"""Open the peers that use MinIO. Their imports are slow, so they are imported only then."""

from benchmarks.peers.base import Peer, open_peers
from benchmarks.pool import HostPool
from benchmarks.report import Report
from memkv_sglang.config.schema import MinioConfig

NAMES = ("seaweedfs", "minio-py", "obstore")


def open_on_minio(
    report: Report, names: tuple[str, ...], config: MinioConfig, pool: HostPool
) -> dict[str, Peer]:
    """Return the peers of `NAMES` that can run here. Each has objects of its own."""

    def bucket(name: str) -> MinioConfig:
        return MinioConfig(
            endpoint=config.endpoint,
            bucket=f"{config.bucket}-{name}",
            access_key=config.access_key,
            secret_key=config.secret_key,
            ca_file=config.ca_file,
        )

    def seaweedfs(pool: HostPool) -> Peer:
        from benchmarks.peers.seaweedfs import SeaweedFs

        return SeaweedFs(bucket("seaweedfs"), pool)

    def minio_py(pool: HostPool) -> Peer:
        from benchmarks.peers.minio_py import MinioPy

        return MinioPy(bucket("minio-py"), pool)

    def obstore(pool: HostPool) -> Peer:
        from benchmarks.peers.obstore import Obstore

        return Obstore(bucket("obstore"), pool)

    makers = {"seaweedfs": seaweedfs, "minio-py": minio_py, "obstore": obstore}
    return open_peers(report, {name: makers[name] for name in names}, pool)
