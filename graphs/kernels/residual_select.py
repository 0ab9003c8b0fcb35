"""The Triton kernel of `ResidualSelect`: G = V Vᵀ as tiles, then K picks of the pivoted Cholesky factorisation.

One launch does both. Programs of an image first share the tiles of G's lower half; then each keeps its blocks of
tokens through all picks, and one barrier a pick is all they say to each other.

**Bytes and floor**, from an H100 SXM's data sheet (3.35 TB/s, 50 MB of L2, 494 TFLOP/s TF32, 989 TFLOP/s FP16):

|                                  | N 576, K 64, D 4096   | N 2,880, K 320, D 4096 |
|----------------------------------|-----------------------|------------------------|
| V from memory, once, float16     | 4.7 MB, 1.4 µs        | 23.6 MB, 7 µs          |
| V from memory, once, float32     | 9.4 MB, 2.8 µs        | 47.2 MB, 14 µs         |
| V by tiles of 64, from L2, f16   | 45 MB                 | 1.09 GB                |
| G's lower half, float16          | 1.4 GFLOP, 1.5 µs     | 34 GFLOP, 35 µs        |
| the same, float32 in three TF32  | 8 µs                  | 206 µs                 |
| G: written; K of its rows read   | 1.3 MB; 0.15 MB       | 33 MB; 3.7 MB          |
| columns L read, sum over picks   | 4.7 MB                | 590 MB                 |

None of that limits it: the K picks depend on each other. Each is one arrival at an atomic in L2 (two trips) and three
loads that wait for one another (best block, its scores, the pick's row), each an L2 trip of about 0.2 µs: 1.3 to 2 µs
a pick, so some 0.1 ms at K 64 and 0.5 ms at K 320, plus G. That is arithmetic, not a measurement.

**Why G and not V v_p on demand**, which does K/N of the multiplications: each pick would stream V again, from L2 at
best. At N 576 in float16 that is 64 × 4.7 MB, 60 µs at 5 TB/s, against some 10 µs for G; at N 2,880, 320 × 23.6 MB,
1.5 ms, and in float32 V does not stay in L2 at all.

**Arithmetic.** Plain TF32 would change picks. float16 goes to the tensor cores as it is: its products are exact there.
float32 is split in two TF32 parts and takes three products ("tf32x3"): what is dropped is below 2⁻²¹ of each product.
Tensor cores may truncate as they add, always downward, so each slice of DEPTH products is added to the sum by itself,
in IEEE float32: the bias does not grow with D. Together that is at most 2 × 10⁻⁶ of ‖v_i‖ ‖v_j‖. Rows that are equal
to the bit get entries that are, so duplicates cancel. Everything after G is IEEE float32.

**The scratch** comes uninitialised, from PyTorch as from TensorRT: see `_meet`.

Source: arXiv 2603.21105; the rules of ties, exhaustion and masks are those of docs/method.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resprune import method

TIE = tl.constexpr(1 - method.TIE)
EXHAUSTED = tl.constexpr(method.EXHAUSTED)
FILL = tl.constexpr(method.FILL)
NONE = tl.constexpr(2**30)  # above any token's index

# Words before the arrays: arrivals and the best score before any pick, then a greeting and an answer for each program.
HEADER = tl.constexpr(32)
MAX_PROGRAMS = tl.constexpr(256)
MAX_BLOCKS = tl.constexpr(1024)


@triton.jit
def residual_select(
    visual,
    gain,
    token_mask,
    num_tokens,
    first_step,
    last_step,
    pick_order,
    scratch,
    D: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    TOKENS: tl.constexpr,
    STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From visual [B, N, D], gain [B, N] float32, token_mask [B, N] bool to pick_order [B, K] int64.

    The grid is (programs of an image, B); all programs of an image must be on the GPU at the same time, at most
    MAX_PROGRAMS. Steps first_step … last_step − 1 are done: 0 is G, 1 the scores before any pick, 2 + t pick t, and
    K + 2 is the end. A launch for each step needs no barrier, and is how the interpreter runs a grid of many.
    TILE and DEPTH shape G's tiles, TOKENS is a block of tokens, STEPS a slice of earlier picks; all powers of 2.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    image = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(num_tokens, TOKENS)
    words = HEADER + 2 * MAX_PROGRAMS + 2 * MAX_BLOCKS + num_tokens * (5 + K + num_tokens)
    visual += image * num_tokens * D
    gain += image * num_tokens
    token_mask += image * num_tokens
    pick_order += image * K
    scratch += image * words
    arrivals = scratch.to(tl.pointer_type(tl.int32))
    best_before = scratch + 1
    tops = scratch + HEADER + 2 * MAX_PROGRAMS  # [2, MAX_BLOCKS]: the best score of each block
    energy = tops + 2 * MAX_BLOCKS  # [2, N]
    score = energy + 2 * num_tokens  # [2, N]
    fill = score + 2 * num_tokens  # [N]
    columns = fill + num_tokens  # [N, K]: L
    gram = columns + num_tokens * K  # [N, N]

    if first_step == 0:
        _gram_tiles(visual, gram, num_tokens, D, TILE, DEPTH, PRECISION)
        if last_step > 1:
            _meet(arrivals, program, programs)
    workers = tl.minimum(programs, blocks)  # the others only had tiles to do
    if program < workers:
        expected = programs
        for step in range(tl.maximum(first_step, 1), last_step):
            if step == 1:
                _scores_before(
                    gram, gain, token_mask, energy, score, fill, tops, num_tokens, program, programs, TOKENS
                )
            else:
                t = step - 2
                now, after = t % 2, (t + 1) % 2  # what this pick reads, and what the next one will
                best, pick = _best(score + now * num_tokens, tops + now * MAX_BLOCKS, num_tokens, TOKENS)
                found = pick < num_tokens
                if program == 0:
                    tl.store(pick_order + t, tl.where(found, pick, -1).to(tl.int64))
                    if t == 0:
                        tl.store(best_before, best)
                before = tl.where(t == 0, best, tl.load(best_before, cache_modifier=".cg"))
                threshold = tl.maximum(before, 0.0) * EXHAUSTED
                exhausted = best <= threshold
                pick = tl.where(found, pick, 0)  # any token will do: none is available
                pivot_energy = tl.load(energy + now * num_tokens + pick, cache_modifier=".cg")
                pivot = tl.sqrt_rn(tl.where(exhausted, 1.0, pivot_energy))
                for block in range(program, blocks, programs):
                    tokens = block * TOKENS + tl.arange(0, TOKENS)
                    here = tokens < num_tokens
                    column = _column(gram, columns, tokens, pick, t, num_tokens, K, TOKENS, STEPS)
                    column = tl.where(exhausted, 0.0, tl.div_rn(column, pivot))
                    tl.store(columns + tokens * K + t, column, mask=here)
                    left = tl.load(energy + now * num_tokens + tokens, mask=here, other=0.0) - column * column
                    left = tl.where(tokens == pick, 0.0, left)
                    tl.store(energy + after * num_tokens + tokens, left, mask=here)
                    reserve = tl.load(fill + tokens, mask=here, other=-1.0)
                    reserve = tl.where(tokens == pick, -1.0, reserve)
                    tl.store(fill + tokens, reserve, mask=here)
                    scores = tl.load(gain + tokens, mask=here, other=0.0) * left
                    scores = tl.where(scores > threshold, scores, reserve)
                    tl.store(score + after * num_tokens + tokens, scores, mask=here)
                    tl.store(tops + after * MAX_BLOCKS + block, tl.max(scores, axis=0))
            if step + 1 < last_step:
                expected += workers
                _barrier(arrivals, programs, expected)


@triton.jit
def _gram_tiles(
    visual,
    gram,
    num_tokens,
    D: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The program's tiles of the lower half of G = V Vᵀ, and their mirror images in the upper half."""
    side = tl.cdiv(num_tokens, TILE)
    depths = tl.arange(0, DEPTH)
    for tile in range(tl.program_id(0), side * (side + 1) // 2, tl.num_programs(0)):
        # Tiles are numbered by row: row r begins at r (r + 1) / 2. The root may be off by one, either way.
        row = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
        row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
        row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
        column = tile - row * (row + 1) // 2
        left = row * TILE + tl.arange(0, TILE)
        right = column * TILE + tl.arange(0, TILE)
        left_there, right_there = left < num_tokens, right < num_tokens
        product = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(0, D, DEPTH):
            inside = start + depths < D
            a = tl.load(
                visual + left[:, None] * D + (start + depths)[None, :],
                mask=left_there[:, None] & inside[None, :],
                other=0.0,
            )
            b = tl.load(
                visual + right[None, :] * D + (start + depths)[:, None],
                mask=inside[:, None] & right_there[None, :],
                other=0.0,
            )
            if visual.dtype.element_ty == tl.bfloat16:
                a = a.to(tl.float32)  # its 8 bits fit the 11 of a TF32 number: the second part is 0
                b = b.to(tl.float32)
            # The last argument keeps the compiler from adding inside the tensor core: see "Arithmetic".
            product += tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=DEPTH)
        both = left_there[:, None] & right_there[None, :]
        tl.store(gram + left[:, None] * num_tokens + right[None, :], product, mask=both)
        if row != column:  # on the diagonal the mirror image is the tile itself, but for the last bit
            mirrored = right_there[:, None] & left_there[None, :]
            tl.store(gram + right[:, None] * num_tokens + left[None, :], tl.trans(product), mask=mirrored)


@triton.jit
def _scores_before(
    gram, gain, token_mask, energy, score, fill, tops, num_tokens, program, programs, TOKENS: tl.constexpr
):
    """Energies from the diagonal of G, so that a duplicate's residual cancels to rounding, and the first scores."""
    for block in range(program, tl.cdiv(num_tokens, TOKENS), programs):
        tokens = block * TOKENS + tl.arange(0, TOKENS)
        here = tokens < num_tokens
        available = tl.load(token_mask + tokens, mask=here, other=0) != 0
        whole = tl.load(
            gram + tokens * (num_tokens + 1), mask=here & available, other=0.0, cache_modifier=".cg"
        )
        scores = tl.where(available, tl.load(gain + tokens, mask=here, other=0.0) * whole, -1.0)
        tl.store(energy + tokens, whole, mask=here)
        tl.store(score + tokens, scores, mask=here)
        tl.store(fill + tokens, tl.where(available, scores * FILL, -1.0), mask=here)
        tl.store(tops + block, tl.max(scores, axis=0))


@triton.jit
def _best(score, tops, num_tokens, TOKENS: tl.constexpr):
    """The best score, and the lowest index among those tied with it: in the first block whose best is tied.

    The index is NONE where no token is available: the best is −1 then, or NaN if the features are.
    """
    blocks = tl.arange(0, MAX_BLOCKS)
    there = blocks < tl.cdiv(num_tokens, TOKENS)
    top = tl.load(tops + blocks, mask=there, other=-1.0, cache_modifier=".cg")
    best = tl.max(top, axis=0)
    tied = best * TIE
    block = tl.min(tl.where(there & (top >= tied), blocks, MAX_BLOCKS), axis=0)
    tokens = block * TOKENS + tl.arange(0, TOKENS)
    scores = tl.load(score + tokens, mask=tokens < num_tokens, other=-1.0, cache_modifier=".cg")
    return best, tl.min(tl.where(scores >= tied, tokens, NONE), axis=0)


@triton.jit
def _column(
    gram, columns, tokens, pick, t, num_tokens, K: tl.constexpr, TOKENS: tl.constexpr, STEPS: tl.constexpr
):
    """G[tokens, pick] − L[tokens, :t] L[pick, :t]ᵀ, as [TOKENS]."""
    here = tokens < num_tokens
    column = tl.load(gram + pick * num_tokens + tokens, mask=here, other=0.0, cache_modifier=".cg")
    for start in range(0, t, STEPS):
        steps = start + tl.arange(0, STEPS)
        earlier = steps < t
        mine = tl.load(
            columns + tokens[:, None] * K + steps[None, :], mask=here[:, None] & earlier[None, :], other=0.0
        )
        # Written by the program that keeps the pick: from L2, never from this one's L1.
        theirs = tl.load(columns + pick * K + steps, mask=earlier, other=0.0, cache_modifier=".cg")
        column -= tl.sum(mine * theirs[None, :], axis=1)
    return column


@triton.jit
def _meet(arrivals, program, programs):
    """The first barrier, on memory that holds anything: afterwards `arrivals` is `programs` for all of them.

    Program 0 sets `arrivals` to 0, but nobody else can tell when. So each other program greets it with a number that
    its answer does not have yet, and waits until the answer changes: nobody but program 0 of this launch writes
    answers, and it does so after the 0. Only then does it arrive.
    """
    tl.debug_barrier()  # the program's own tiles, before it says that they are there
    if programs > 1:
        greetings, answers = arrivals + HEADER, arrivals + HEADER + MAX_PROGRAMS
        if program == 0:
            tl.atomic_xchg(arrivals, 0, sem="release")
            tl.debug_barrier()
            lanes = tl.arange(0, MAX_PROGRAMS)
            others = (lanes > 0) & (lanes < programs)
            arrived = 0
            while arrived < programs - 1:
                greeting = tl.load(greetings + lanes, mask=others, other=0, volatile=True)
                tl.atomic_xchg(answers + lanes, greeting, mask=others, sem="release")
                arrived = tl.atomic_add(arrivals, 0, sem="acquire")
        else:
            before = tl.atomic_add(answers + program, 0, sem="acquire")
            tl.atomic_xchg(greetings + program, before + 1, sem="release")
            answer = before
            while answer == before:
                answer = tl.atomic_add(answers + program, 0, sem="acquire")
        _barrier(arrivals, programs, programs)


@triton.jit
def _barrier(arrivals, programs, expected):
    """Arrive, and wait until `expected` arrivals are counted; what was written before is read after."""
    tl.debug_barrier()
    if programs > 1:
        arrived = tl.atomic_add(arrivals, 1, sem="acq_rel") + 1
        while arrived < expected:
            arrived = tl.atomic_add(arrivals, 0, sem="acquire")
        tl.debug_barrier()
