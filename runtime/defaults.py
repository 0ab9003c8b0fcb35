"""Numbers that options and the Python API share as defaults; nothing is imported, so that help is quick."""

MAX_PIXELS = 64_000_000
"""Of the largest image that is taken."""
TIMEOUT_SECONDS, DEADLINE_SECONDS = 120.0, 600.0
"""Of a server: its longest silence, and its longest whole answer."""
GPU_LAYERS = 0
"""Of a GGUF file, on the GPU."""
LEAST_REPEATS, REPEAT_SECONDS = 5, 5.0
"""How often each budget is measured, and how long it is measured again."""
BENCH_IMAGE = (640, 480)
"""Width and height of the image that is made to measure with."""
