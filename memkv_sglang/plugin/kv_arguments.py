"""Every server argument of SGLang, and whether it changes the bytes of stored pages.

An argument that can change them is part of the namespace. So is an argument that is not in these
tables, such as one of a newer SGLang. Servers that differ in it share nothing, which costs hits but
never serves a wrong page. A test compares the tables with SGLang's own list of arguments.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from memkv_sglang.plugin.fingerprint_cache import cached_fingerprint

log = logging.getLogger(__name__)

Table = Mapping[str, str]
"""Argument names, separated by spaces. The key is the reason why they are in the table."""

NAMED: Table = {
    "computes another model from the same files": """
        is_embedding model_impl model_config_parser custom_weight_loader model_loader_extra_config
        load_format forward_hooks enable_multimodal language_model_only
        dllm_algorithm dllm_algorithm_config dllm_fdfo prefill_only_disable_kv_cache
        encoder_only language_only""",
    "the weights or activations are quantized or rounded differently": """
        modelopt_quant modelopt_checkpoint_restore_path quantize_and_serve rl_quant_profile
        enable_tf32_matmul enable_quant_communications flashinfer_mxfp4_moe_precision
        deepep_dispatcher_output_dtype enable_w4a4_mxfp4_megamoe prefill_kv_cache_dequant_dtype
        kt_weight_path kt_method kt_num_gpu_experts kt_max_deferred_experts_per_token
        triton_attention_reduce_in_fp32 enforce_shared_experts_fusion disable_shared_experts_fusion
        enable_megamoe_for_layernorm_sp
        enable_deterministic_inference rl_on_policy_target""",
    "the pages have another layout or hold something else": """
        enable_page_major_kv_layout enable_unified_memory disable_hybrid_swa_memory c128_page_size
        enable_kv_cache_sharding enable_dsa_cache_layer_split enable_prefill_cp cp_strategy
        enable_cp_decode_attn_tp enable_deepseek_v4_fp4_indexer qsa_indexer_dtype enable_hisparse
        hisparse_config hicache_host_memory_mode enable_scattered_sconv enable_linker_mla_dedup
        enable_encoder_swa_bounded_replay enable_decoder_swa_bounded_replay
        dsa_prefill_backend dsa_decode_backend dsv4_prefill_backend dsv4_attn_backend
        dsa_topk_backend dsa_paged_mqa_logits_backend dsa_triton_union enable_dsa_fused_indexer""",
    "recurrent state is stored in another form or at other positions": """
        mamba_backend mamba_ssm_dtype enable_mamba_cache_stochastic_rounding
        mamba_cache_philox_rounds mamba_radix_cache_strategy uses_mamba_radix_cache
        mamba_track_interval enable_int8_mamba_checkpoint linear_attn_backend
        linear_attn_decode_backend linear_attn_prefill_backend linear_attn_verify_backend
        enable_linear_replayssm linear_replayssm_cache_len enable_linear_replayssm_spec""",
    "the draft model's KV is stored as well": """
        speculative_algorithm uno_lora_path speculative_draft_load_format speculative_eagle_topk
        speculative_dflash_block_size speculative_dspark_block_size speculative_token_map
        speculative_draft_kv_cache_dtype speculative_draft_window_size
        speculative_draft_sink_size speculative_draft_model_quantization enable_multi_layer_eagle
        speculative_enable_w4a4_mxfp4_megamoe decoupled_spec_role""",
    "turns the same image or adapter into other numbers": """
        mm_process_config image_processor_backend disable_fast_image_processor
        enable_precise_embedding_interpolation experts_shared_outer_loras""",
}
"""Arguments that `Namespace.details` names if they are set. Files and directories are named by
content."""

ELSEWHERE: Table = {
    "Namespace.model: the fingerprint of the weights": "model_path revision download_dir",
    "Namespace.details: config, the resolved configuration": """
        json_model_override_args decrypted_config_file context_length""",
    "Namespace.details: dtype, quantization": "dtype quantization",
    "Namespace.details: kv_scales": "quantization_param_path",
    "Namespace.details: kv_format, the format that SGLang resolved": "kv_cache_dtype",
    "Namespace.details: draft, the fingerprint of the draft model": """
        speculative_draft_model_path speculative_draft_model_revision
        decrypted_draft_config_file""",
    "Namespace.layout": "hicache_mem_layout",
    "Namespace.page_size": "page_size",
    "Namespace.shard": "tp_size pp_size dcp_size attn_cp_size attn_dp_size enable_dp_attention",
    "the page's hash: an adapter's content seeds it": "enable_lora lora_paths",
    "the page's hash: media are part of it, see plugin/media.py": "trust_mm_content_hashes",
}
"""Arguments that a namespace or a page's hash covers in another way."""

HARMLESS: Table = {
    "selects a kernel; results are equal up to rounding, and namespaces include the layout": """
        attention_backend decode_attention_backend prefill_attention_backend enable_lean_attention
        mm_attention_backend fp8_gemm_runner_backend fp4_gemm_runner_backend bf16_gemm_backend
        disable_flashinfer_autotune flashinfer_autotune_skip_ops enable_fused_qk_norm_rope
        enable_fused_moe_sum_all_reduce triton_attention_num_kv_splits
        triton_attention_split_tile_size flashinfer_mla_disable_ragged moe_runner_backend
        enable_torch_compile enable_torch_compile_debug_mode torch_compile_max_bs
        lora_backend max_lora_chunk_size lora_use_virtual_experts enable_nvidia_megakernel
        enable_amd_monokernel speculative_draft_attention_backend speculative_attention_mode
        speculative_dsa_topk_backend speculative_moe_runner_backend speculative_moe_a2a_backend
        disable_flashinfer_cutlass_moe_fp4_allgather cuda_graph_max_seq_len_prefill""",
    "runs the same kernels through CUDA graphs": """
        cuda_graph_config cuda_graph_backend_decode cuda_graph_backend_prefill
        cuda_graph_max_bs_decode cuda_graph_max_bs_prefill cuda_graph_bs_decode
        cuda_graph_bs_prefill cuda_graph_prefill_max_context disable_prefill_cuda_graph
        disable_decode_cuda_graph disable_cuda_graph disable_cuda_graph_padding
        enable_profile_cuda_graph enable_cudagraph_gc debug_cuda_graph""",
    "distributes the work; the shard says which part of the KV a page holds": """
        nccl_port dist_timeout dist_init_addr gated_launch_port nnodes node_rank
        pp_max_micro_batch_size pp_async_batch_depth dp_size load_balance_method moe_dp_size
        dwdp_size dcp_comm_backend dcp_replicate_q_proj enable_dp_attention_local_control_broadcast
        enable_dp_lm_head enable_tp_lm_head_all_to_all enable_attn_tp_input_scattered
        enable_shared_experts_attn_tp shared_experts_tp_size enable_dense_mlp_attn_tp
        enable_layernorm_sp disable_attn_tp_gather enable_p2p_check enable_nccl_nvls enable_symm_mem
        disable_custom_all_reduce enable_mscclpp enable_torch_symm_mem pre_warm_nccl
        boundary_reduction speculative_boundary_reduction enable_flashinfer_allreduce_fusion
        enforce_disable_flashinfer_allreduce_fusion flashinfer_allreduce_fusion_backend
        enable_aiter_allreduce_fusion disable_aiter_allreduce_fusion_in_prefill
        disable_aiter_allreduce_fusion_in_decode ep_size moe_a2a_backend deepep_v2_mode deepep_mode
        fuseep_mode flashinfer_a2a_dispatch_type ep_num_redundant_experts ep_dispatch_algorithm
        init_expert_location enable_eplb eplb_algorithm eplb_rebalance_num_iterations
        eplb_rebalance_layers_per_chunk eplb_min_rebalancing_utilization_threshold deepep_config
        moe_dense_tp_size elastic_ep_backend enable_elastic_expert_backup mooncake_ib_device
        enable_waterfill ep_join_mode ep_join_rank_offset elastic_ep_initial_size max_ep_size
        elastic_ep_scale_timeout enable_two_batch_overlap enable_single_batch_overlap
        tbo_token_distribution_threshold enable_cp_tp_group_sharing""",
    "schedules requests": """
        max_running_requests max_queued_requests chunked_prefill_size prefill_decode_interval
        prefill_decode_interval_min_bs enable_dynamic_chunking max_prefill_tokens
        prefill_max_requests schedule_policy enable_priority_scheduling disable_priority_preemption
        default_priority_value abort_on_priority_when_disabled schedule_low_priority_values_first
        priority_scheduling_preemption_threshold retraction_policy schedule_conservativeness
        disable_chunked_prefix_cache disable_overlap_schedule num_continuous_decode_steps
        scheduler_recv_interval enable_mixed_chunk enable_prefill_delayer
        prefill_delayer_max_delay_passes prefill_delayer_token_usage_low_watermark
        prefill_delayer_forward_passes_buckets prefill_delayer_wait_seconds_buckets
        prefill_delayer_queue_min_ratio prefill_delayer_max_delay_ms min_free_slots_delay
        enable_pdmux pdmux_config_path sm_group_num enable_mis lora_drain_wait_threshold
        max_loaded_loras max_loras_per_batch lora_eviction_policy enable_lora_overlap_loading
        speculative_skip_dp_mlp_sync""",
    "limits the adapters that a server accepts": """
        lora_target_modules max_lora_rank lora_strict_loading""",
    "sizes or evicts memory": """
        mem_fraction_static max_total_tokens swa_full_tokens_ratio
        _swa_full_tokens_ratio_explicitly_set swa_prefix_tails radix_eviction_policy
        radix_eviction_policy_config _radix_eviction_policy_explicitly_set disable_radix_cache
        radix_cache_backend max_mamba_cache_size mamba_max_states_per_path mamba_full_memory_ratio
        int8_mamba_ckpt_size cpu_offload_gb offload_group_size offload_num_in_group
        offload_prefetch_step offload_mode ple_offload_embedding ple_offload_backend ple_offload_dir
        enable_memory_saver enable_weights_cpu_backup enable_draft_weights_cpu_backup
        enable_paged_experts paged_experts_num_resident kt_cpuinfer kt_threadpool_count""",
    "configures HiCache's host pool and its storage": """
        enable_hierarchical_cache hicache_ratio hicache_size hicache_host_memory_fraction
        hicache_write_policy hicache_io_backend hicache_storage_backend
        hicache_storage_prefetch_policy hicache_storage_backend_extra_config
        hicache_storage_prefetch_retry_poll_interval hicache_storage_prefetch_retry_max_attempts
        enable_unified_cache_external_linker unified_cache_external_linker_backend
        unified_cache_external_linker_config enable_lmcache lmcache_config_file enable_flexkv
        flexkv_config_file""",
    "changes which tokens a request has or generates, not the KV of given tokens": """
        tokenizer_path tokenizer_mode tokenizer_backend tokenizer_worker_num detokenizer_worker_num
        skip_tokenizer_init trust_remote_code random_seed mlx_enable_sampling chat_template
        trust_request_chat_template hf_chat_template_name completion_template return_input_ids
        return_output_ids reasoning_parser default_chat_template_kwargs strip_thinking_cache
        enable_strict_thinking tool_call_parser tool_server sampling_defaults
        preferred_sampling_params allow_auto_truncate stream_interval batch_notify_size
        stream_response_default_include_usage incremental_streaming_output enable_streaming_session
        enable_session_radix_cache sampling_backend grammar_backend
        constrained_json_whitespace_pattern constrained_json_disable_any_whitespace
        constrained_json_max_whitespace_cnt speculative_num_steps speculative_num_draft_tokens
        speculative_dspark_sps_table_path speculative_dspark_confidence_sts_path
        speculative_dspark_align_verify_tokens_to_graph_tier speculative_accept_threshold_single
        speculative_accept_threshold_acc speculative_use_rejection_sampling
        speculative_use_block_verification speculative_adaptive speculative_adaptive_config
        speculative_ngram_min_bfs_breadth speculative_ngram_max_bfs_breadth
        speculative_ngram_match_type speculative_ngram_max_trie_depth speculative_ngram_capacity
        speculative_ngram_external_corpus_path speculative_ngram_external_sam_budget
        speculative_ngram_external_corpus_max_tokens speculative_domino_candidate_pool_size
        enable_custom_logit_processor enable_dynamic_batch_tokenizer
        dynamic_batch_tokenizer_batch_size dynamic_batch_tokenizer_batch_timeout
        enable_tokenizer_batch_encode
        disable_tokenizer_batch_decode disable_outlines_disk_cache enable_fp32_lm_head
        sampling_mask_max_tokens enable_watermark watermark_config watermark_key watermark_key_b
        watermark_context_window watermark_mixing_probability watermark_max_probability
        watermark_default_enabled watermark_enforce_all""",
    "moves or caches media, which page hashes identify by content": """
        enable_broadcast_mm_inputs_process enable_prefix_mm_cache mm_enable_dp_encoder
        mm_processor_worker_num mm_io_worker_num allowed_media_domains media_url_max_file_size_mb
        mm_preprocess_cache_size_mb limit_mm_data_per_request enable_mm_global_cache
        mm_global_cache_backend mm_feature_transport asr_max_buffer_seconds
        asr_max_concurrent_sessions encoder_transfer_backend encoder_urls encoder_bootstrap_port
        encoder_register_urls enable_adaptive_dispatch_to_encoder""",
    "moves KV between servers": """
        disaggregation_mode disaggregation_transfer_backend disaggregation_bootstrap_port
        disaggregation_ib_device disaggregation_decode_enable_radix_cache
        disaggregation_decode_enable_offload_kvcache disaggregation_decode_retraction_backup
        num_reserved_decode_tokens disaggregation_decode_extra_slots
        disaggregation_decode_polling_interval disaggregation_decode_host_receive_threshold
        disaggregation_decode_allocation_policy disaggregation_enable_kv_checksum
        optimistic_prefill_attempts enable_pd_role_switch decoupled_spec_bind_endpoint
        decoupled_spec_connect_endpoints decoupled_spec_rank""",
    "loads the same weights in another way; updated weights get their own namespace": """
        modelopt_checkpoint_save_path modelopt_export_path startup_weight_load_mode
        weight_loader_disable_mmap weight_loader_prefetch_checkpoints
        weight_loader_prefetch_num_threads weight_loader_drop_cache_after_load
        remote_instance_weight_loader_seed_instance_ip
        remote_instance_weight_loader_seed_instance_service_port
        remote_instance_weight_loader_send_weights_group_ports remote_instance_weight_loader_backend
        remote_instance_weight_loader_start_seed_via_transfer_engine engine_info_bootstrap_port
        modelexpress_config model_checksum delete_ckpt_after_loading
        checkpoint_engine_wait_weights_before_ready weight_cache_mode weight_cache_socket
        weight_cache_timeout weight_version _speculative_draft_quantization_explicitly_set""",
    "runs the process and its endpoints": """
        device base_gpu_id gpu_id_step watchdog_timeout soft_watchdog_timeout sleep_on_idle use_ray
        custom_sigquit_handler numa_node gc_threshold host port fastapi_root_path smg_grpc_mode
        grpc_mode grpc_port grpc_worker_threads grpc_response_timeout_secs sidecar sidecar_args
        skip_server_warmup warmups enable_http2 http2_max_concurrent_streams
        http2_initial_connection_window_size ssl_keyfile ssl_certfile ssl_ca_certs
        ssl_keyfile_password enable_ssl_refresh api_key admin_api_key served_model_name
        file_storage_path enable_cache_report enable_response_store enable_http_worker_reuseport""",
    "logs, measures or returns more": """
        log_level log_level_http log_requests log_requests_level log_requests_format
        log_requests_target uvicorn_access_log_exclude_prefixes crash_dump_folder show_time_cost
        enable_metrics smg_http_sidecar_port enable_mfu_metrics enable_metrics_for_all_schedulers
        load_snapshot_publish_interval tokenizer_metrics_custom_labels_header
        tokenizer_metrics_allowed_custom_labels extra_metric_labels bucket_time_to_first_token
        bucket_inter_token_latency bucket_e2e_request_latency prompt_tokens_buckets
        generation_tokens_buckets gc_warning_threshold_secs decode_log_interval
        enable_request_time_stats_logging kv_events_config load_publish_endpoint
        enable_forward_pass_metrics forward_pass_metrics_worker_id forward_pass_metrics_ipc_name
        enable_trace trace_modules otlp_traces_endpoint otlp_service_name export_metrics_to_file
        export_metrics_to_file_dir stat_loggers enable_layerwise_nvtx_marker spec_trace_dir
        expert_distribution_recorder_mode expert_distribution_recorder_buffer_size
        expert_balancedness_report_mode kv_canary kv_canary_real_data kv_canary_sweep_interval
        debug_tensor_dump_output_folder debug_tensor_dump_layers debug_tensor_dump_input_file
        enable_return_hidden_states return_hidden_states_mode enable_return_routed_experts
        enable_return_indexer_topk enable_return_aux_hidden_states aux_hidden_state_capture
        return_aux_hidden_state_layer_ids msprobe_dump_config""",
    "belongs to the tier itself": """
        enable_memkv memkv_config memkv_endpoint memkv_nvme_directory memkv_nvme_capacity
        memkv_settings""",
}
"""Arguments that change no stored byte."""

FORMAT_WORDS = frozenset(
    (
        *("KV", "KVCACHE", "Q8KV8", "LAYOUT", "DTYPE", "ROPE", "MAMBA", "SSM", "HADAMARD"),
        *("FP4", "FP8", "BF16", "FP16", "FP32", "INT4", "INT8", "MXFP4", "MXFP8", "NVFP4"),
        *("QUANT", "QUANTIZATION", "DEQUANT", "REQUANT"),
    )
)
"""An environment variable of SGLang may change pages if its name has one of these words."""

HARMLESS_VARIABLES: Table = {
    "checks KV at run time, changes nothing": """
        SGLANG_CHECK_KV_PAGE_INVARIANTS SGLANG_TEST_DISAGG_KV_CHECKSUM_MISMATCH_PROB""",
    "sizes or schedules": """
        SGLANG_MAX_KV_CHUNK_CAPACITY SGLANG_ENABLE_POST_CAPTURE_KV_SIZING
        SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE
        SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT""",
}
"""Environment variables with such a word that change no stored byte."""

HARMLESS_PREFIX = "SGLANG_KV_CANARY_"


def names_of(table: Table) -> frozenset[str]:
    """Return all argument names in a table."""
    return frozenset(name for names in table.values() for name in names.split())


_NAMED, _ELSEWHERE, _HARMLESS = names_of(NAMED), names_of(ELSEWHERE), names_of(HARMLESS)


def describe_arguments(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, str]:
    """Return the server arguments that change pages and differ from their defaults, by name.

    `values` are the resolved arguments. Reads the files that they point to. Raises `OSError` and
    `NoFingerprintError`.
    """
    described = {}
    unknown = []
    for name, value in values.items():
        if name in _HARMLESS or name in _ELSEWHERE or value == defaults.get(name):
            continue
        described["arg." + name] = _content(value)
        if name not in _NAMED:
            unknown.append(name)
    if unknown:
        log.warning(
            "memkv: this version does not know what these server arguments do, so only servers "
            "with equal values share pages: %s",
            ", ".join(sorted(unknown)),
        )
    return described


def describe_environment(environ: Mapping[str, str], known: Iterable[str]) -> dict[str, str]:
    """Return those variables of SGLang (`known`) in `environ` that may change pages."""
    return {
        "env." + name: environ[name] for name in known if name in environ and may_change_pages(name)
    }


def may_change_pages(variable: str) -> bool:
    """Return whether an environment variable of SGLang may change the bytes of pages."""
    if variable.startswith(HARMLESS_PREFIX) or variable in names_of(HARMLESS_VARIABLES):
        return False
    return not FORMAT_WORDS.isdisjoint(variable.split("_"))


def _content(value: Any) -> str:
    """Return a value as text. A path to a file or directory is replaced by its content."""
    if isinstance(value, str):
        path = Path(value)
        with suppress(ValueError):  # the text cannot be a path
            if path.is_file():
                return hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_dir():
                return cached_fingerprint(path)
        return value
    return json.dumps(value, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
