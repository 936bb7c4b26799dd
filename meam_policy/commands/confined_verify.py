"""What `meam verify --untrusted` starts: `meam verify` within limits.

python -m meam_policy.commands.confined_verify PARENT MEMORY_BYTES CPU_SECONDS POLICY OPTION...
"""

from __future__ import annotations

import sys

from meam_policy.commands import verify
from meam_policy.diagnosis.confinement import OUT_OF_MEMORY, confine, end_with
from meam_policy.errors import MeamError
from meam_policy.inference.providers import import_onnxruntime

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Verify within limits; the exit status, as of `meam verify`, or `OUT_OF_MEMORY`."""
    parent, memory, cpu_seconds, *rest = arguments
    end_with(int(parent))
    try:
        import_onnxruntime()
        confine(int(memory), int(cpu_seconds))
        verify.run(rest, "meam verify")
    except (MeamError, MemoryError) as error:
        if _is_out_of_memory(error):
            return OUT_OF_MEMORY
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _is_out_of_memory(error: BaseException) -> bool:
    # onnxruntime's own types say it in words: "Failed to allocate memory", "std::bad_alloc".
    cause = error.__cause__
    return isinstance(error, MemoryError) or (cause is not None and "alloc" in str(cause).lower())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
