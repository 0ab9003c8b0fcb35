"""Everything that prints a number in the documents: `python -m benchmarks` runs it all."""

import resprune  # noqa: F401 - before any import of onnxruntime, whose telemetry it switches off
