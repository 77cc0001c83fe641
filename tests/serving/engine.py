"""Send an engine the same prompt twice, emptying its pools in between; print JSON."""

import json
import sys
from typing import Any


def main() -> None:
    arguments, tokens = json.load(sys.stdin)
    import sglang

    engine = sglang.Engine(**arguments)

    def ask() -> dict[str, Any]:
        answer = engine.generate(
            input_ids=tokens,
            sampling_params={"max_new_tokens": 8, "temperature": 0, "ignore_eos": True},
        )
        return {**answer["meta_info"], "output_ids": answer["output_ids"]}

    try:
        first = ask()
        while not engine.flush_cache().success:  # fails while pages are being stored
            pass
        print(json.dumps([first, ask()], default=str))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
