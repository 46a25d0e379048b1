"""Numbers of one byte become numbers of the activations' dtype, in registers. Knows bits, and nothing of who has them.

bfloat16 is made of the bits themselves, two numbers in each instruction: a conversion of float8 is a quarter as fast
as other instructions on Hopper, and there is one for each number. `FAST` (which launch.py's PDL stands for) means a
device that has the instructions; the other way is for the interpreter, and for float16.

int8: the seven low bits go into the fraction of 128, whose last place is worth 1, and the sign into that of another
128, where it is worth 128; one less the other is the number. float8_e4m3: exponent and fraction go where bfloat16 has
theirs, and 2^120 makes up for the exponents' different zero, for subnormal numbers, too. (NaN becomes 480: no one
stores it.)

In float16 both cost less: all eight bits fit the fraction of 1024 + 128, and float8 has an instruction for two at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def numbers_of_bytes(x, like, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """int8 or float8_e4m3 in the dtype of `like`, exactly."""
    if FAST and like.dtype == tl.bfloat16 and x.dtype == tl.float8e4nv:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, c, d, large, none;
            mov.b32 large, 0x7b807b80; mov.b32 none, 0x80008000;
            prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424;
            shr.u32 c, a, 4; shr.u32 d, b, 4;
            and.b32 a, a, none; and.b32 b, b, none;
            lop3.b32 a, c, 0x07f007f0, a, 0xea; lop3.b32 b, d, 0x07f007f0, b, 0xea;
            fma.rn.bf16x2 $0, a, large, none; fma.rn.bf16x2 $1, b, large, none; }""",
            "=r,=r,r",
            [x],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    return x.to(like.dtype)


@triton.jit
def halves_of_words(words, HIGH: tl.constexpr, FLOAT8: tl.constexpr, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The low or the high byte of each int16, as float16 numbers.

    A matrix of bytes seen as one of words lies in memory and in registers as the matrix units want 16-bit numbers to,
    transposed ones as well. So every second column goes into one product and the others into another. One result at a
    time: Triton moves a tile straight from shared memory to the registers of a product through nothing else.
    """
    if FAST:
        if FLOAT8:
            asm: tl.constexpr = (
                "{ .reg .b32 t; .reg .b16 low, high; "
                + ("prmt.b32 t, $1, 0, 0x4431;" if HIGH else "prmt.b32 t, $1, 0, 0x4420;")
                + " mov.b32 {low, high}, t; cvt.rn.f16x2.e4m3x2 $0, low; }"
            )
            return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
        of_integers: tl.constexpr = (
            "{ .reg .b32 a, w, less; mov.b32 less, 0xe480e480; "
            + ("shr.u32 w, $1, 8;" if HIGH else "mov.b32 w, $1;")
            + " lop3.b32 a, w, 0x00ff00ff, 0x64806480, 0x6a; add.rn.f16x2 $0, a, less; }"
        )
        return tl.inline_asm_elementwise(of_integers, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    half = (words >> 8 if HIGH else words).to(tl.int8)
    if FLOAT8:
        half = half.to(tl.float8e4nv, bitcast=True)
    return half.to(tl.float16)
