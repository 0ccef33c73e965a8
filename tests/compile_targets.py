"""Compile, for GPUs that are not here, every kernel launch that the ops make at real sizes; prints one JSON
line each.

Run as a script in a process without Triton's interpreter. Launches are caught instead of run, on
uninitialised CPU tensors, so that what is compiled is what the launchers really ask for.
"""

import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_blr.ops.rules.blast import blast_route
from hf_blr.ops.rules.device import Device
from hf_blr.ops.rules.few_tokens import DecodeConfig
from hf_blr.ops.triton import (
    attend,
    blast,
    block_gemm,
    cast,
    cast_columns,
    columns,
    decode_expand,
    decode_one,
    decode_wide,
    expert_rows,
    float8_blast,
    float8_dense,
    float8_low_rank,
    float8_monarch,
    float8_pivoted,
    losses,
    low_rank,
    mix,
    monarch,
    numbers,
    packed,
    pivoted,
    rounding,
    swap,
)
from hf_blr.ops.triton.bits import weights_in_bits
from hf_blr.ops.triton.decode_places import expand_by_places, project_by_places

#: multiprocessors and bytes of shared memory for one program
DEVICES = {
    80: Device((8, 0), 108, 166912),
    86: Device((8, 6), 84, 101376),
    87: Device((8, 7), 16, 166912),
    89: Device((8, 9), 128, 101376),
    90: Device((9, 0), 132, 232448),
}
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
}

launches = []


def catch(kernel, *args, grid=None, warmup=None, **kwargs):
    launches.append((kernel, args, kwargs))


def compile_launch(kernel, args, kwargs, capability):
    """The compiled kernel, from arguments specialised as Triton's launcher would."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = values[param.name]
        aligned = False
        plain = param.do_not_specialize
        if param.is_constexpr or value is None or (type(value) is int and value == 1 and not plain):
            signature[param.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[param.name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[param.name], aligned = f"*{TYPES[value.dtype]}", value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name], aligned = "i32", value % 16 == 0 and not plain
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def call_ops(dtype, tokens, k, n, rank, b1, b2, backward):
    def empty(*shape):
        return torch.empty(shape, dtype=dtype)

    p, q = k // b1, n // b2
    x, bias = empty(tokens, k), empty(n)
    u, s, v = empty(b2, q, rank), empty(b2, b1, rank), empty(b1, rank, p)
    if backward:
        mix.blast_mix(empty(b1, tokens, rank), s)
        mix.blast_mix(empty(b2, tokens, rank), s.transpose(0, 1))
        mix.blast_mix(mix.stack_along_t(b1, tokens, rank, s), s)
        mix.blast_mix_bwd(empty(b2, tokens, rank), empty(b1, tokens, rank), s)
        swap.swap_blocks(empty(b1, tokens, rank // b1 * b2), b2)
        return
    if tokens <= 32:
        blast.forward(x, u, s, v, bias)
        low_rank.forward(x, empty(n, rank), empty(rank, k), bias)
        r = rank // b1
        monarch.forward(x, empty(b2, q, b1 * r), empty(b1, b2 * r, p), None)
        return
    blast.blast_expand(empty(b1, tokens, rank), u, s, bias, empty(tokens, n))
    blocks = empty(tokens, n).view(tokens, b2, q).transpose(0, 1)
    block_gemm.block_gemm(empty(b2, tokens, rank), u, blocks, bias=bias)
    block_gemm.block_gemm(empty(b1, tokens, rank // b1 * b2), empty(b2, q, rank), blocks, swap=True)


def call_grouped(tokens, k, n, rank, b1, b2):
    """The launches of two layers on one input that differ from those of a wider layer; BLAST alone has such."""
    p, q = k // b1, n // b2
    x, out = torch.empty(tokens, k, dtype=torch.bfloat16), torch.empty(tokens, 2 * n, dtype=torch.bfloat16)
    u, s, v = (x.new_empty(s) for s in ((2 * b2, q, rank), (b2, b1, 2 * rank), (b1, 2 * rank, p)))
    if tokens <= 32:
        route = blast_route(tokens, (b1, b2), (p, q, 2 * rank), blast.device_of(x))
        decode_expand.decode_expand(blast.blast_decode(x, s, v, route), u, None, out)
    else:
        blast.blast_expand(x.new_empty(b1, tokens, 2 * rank), u, s, None, out)
        mix.blast_mix(x.new_empty(b1, tokens, 2 * rank), s, layers=2)


def call_activated(k, n, rank, b1, b2):
    """Last stages that activate, and those of two layers whose outputs are multiplied."""
    p, q = k // b1, n // b2

    def empty(*shape):
        return torch.empty(shape, dtype=torch.bfloat16)

    u, s, v, bias = empty(b2, q, rank), empty(b2, b1, rank), empty(b1, rank, p), empty(n)
    for tokens in (1, 16, 1024):
        blast.forward(empty(tokens, k), u, s, v, bias, activation="gelu")
        low_rank.forward(empty(tokens, k), empty(n, rank), empty(rank, k), None, activation="gelu_tanh")
    for z in (empty(b2, 1, 2 * rank), empty(2 * b2, 1, rank)):
        decode_one.expand_one(z, empty(2 * b2, q, rank), None, empty(1, n), "silu", gated=True)


def call_pivoted(dtype, tokens, k, n, rank, index=torch.int32):
    x, u, c = (torch.empty(s, dtype=dtype) for s in ((tokens, k), (n, rank), (rank, k - rank)))
    order = torch.arange(k, dtype=index)
    if tokens <= 32:
        pivoted.forward(x, u, c, order, None)
    else:
        y, rest = columns.gather_columns(x, order, rank)
        columns.gather_columns(x, order[rank:], 0)
        columns.scatter_columns(y, rest, order)


def call_expand_wide(dtype, tokens, blocks, q, rank, config):
    z, u, bias, out = (
        torch.empty(s, dtype=dtype)
        for s in ((blocks, tokens, rank), (blocks, q, rank), blocks * q, (tokens, blocks * q))
    )
    decode_wide.expand_wide(config, z, u, None if blocks == 1 else bias, out)


def call_float8(tokens, k, n, rank, b1, b2):
    """All that float8 launches, on outputs in bfloat16."""

    def codes(*shape):
        return torch.empty(shape, dtype=torch.float8_e4m3fn)

    def scale(*shape):
        return torch.empty(*shape[:-1], 1, dtype=torch.bfloat16)

    p, q, x = k // b1, n // b2, torch.empty(tokens, k, dtype=torch.bfloat16)
    rows, x_scale = cast.cast_rows(x, 448.0, 1e-30)
    cast_columns.transposed_codes(rows)
    cast_columns.cast_both(x, 448.0, 1e-30)
    cast.cast_rows(x, 448.0, 1e-30, torch.empty(k))
    cast_columns.cast_columns(x, 448.0, 1e-30, torch.empty(tokens))
    s, r = x.new_empty(b2, b1, rank), rank // b1
    order = torch.arange(k, dtype=torch.int32)
    for module, shapes in (
        (float8_low_rank, [(n, rank), (rank, k)]),
        (float8_monarch, [(b2, q, b1 * r), (b1, b2 * r, p)]),
        (float8_blast, [(b2, q, rank), s, (b1, rank, p)]),
        (float8_pivoted, [(n, rank), (rank, k - rank), order]),
        (float8_dense, [(n, k)]),
    ):
        tensors = [t if isinstance(t, torch.Tensor) else codes(*t) for t in shapes]
        scales = [None if isinstance(t, torch.Tensor) else scale(*t) for t in shapes]
        for dtype in (torch.bfloat16, torch.float16):
            module.forward(rows, x_scale, tensors, scales, x.new_empty(n, dtype=dtype), dtype, "")


def call_losses(dtype, tokens, words):
    student, teacher = torch.empty(tokens, words), torch.empty(tokens, words, dtype=dtype)
    labels, logs, grads = torch.empty(tokens, dtype=torch.int64), torch.empty(3, tokens), torch.empty(2, tokens)
    losses.losses(student, teacher, labels, 0.5)
    losses.losses_backward(student, teacher, labels, logs, grads, 0.5)


def call_attention(dtype, batch, heads, groups, length, d):
    q, k = torch.empty(batch, heads * groups, 1, d, dtype=dtype), torch.empty(batch, heads, length, d, dtype=dtype)
    attend.attend(q, k, k, torch.empty(batch, length, dtype=torch.uint8), 0.1)


def call_experts(dtype, rows, b, q, p, transposed=False, bits=None, group=None):
    w = torch.empty(8, b, p, q, dtype=dtype).mT if transposed else torch.empty(8, b, q, p, dtype=dtype)
    if bits is not None:
        w = weights_in_bits(*codes_of((8, b, q, p), bits, group))
    expert_rows.expert_rows(torch.empty(rows, b, p, dtype=dtype), w, torch.zeros(rows, dtype=torch.int64))


#: each card has its own tokens, bits and group: what they share is compiled once
PACKED = {
    80: (torch.float16, 1, 8, None, 764, 2304, 192, 4, 16),
    86: (torch.bfloat16, 32, 4, 128, 4096, 4096, 1024, 4, 16),
    87: (torch.bfloat16, 16, 0, None, 4096, 14336, 1536, 4, 4),
    90: (torch.bfloat16, 1, 4, 128, 4096, 4096, 1024, 4, 4),
}


def codes_of(shape, bits, group):
    """(codes, scale, bits, length) of a factor, float8 where bits is 0."""
    if not bits:
        codes = torch.empty(shape, dtype=torch.float8_e4m3fn)
    else:
        codes = torch.empty(*shape[:-1], -(-shape[-1] * bits // 32), dtype=torch.int32)
    scale = torch.empty(*shape[:-1], shape[-1] // group if group else 1, dtype=torch.bfloat16)
    return codes, scale, bits or 8, shape[-1]


def call_packed(dtype, tokens, bits, group, k, n, rank, b1, b2):
    """All that layers in bits launch at few tokens, and the way to numbers; float8 where bits is 0."""

    def factor(*shape):
        return codes_of(shape, bits, group)

    p, q, r, x = k // b1, n // b2, rank // b1, torch.empty(tokens, k, dtype=dtype)
    s, order = torch.empty(b2, b1, rank, dtype=dtype), torch.arange(k, dtype=torch.int32)
    for run, tensors in (
        (packed.low_rank, [factor(n, rank), factor(rank, k)]),
        (packed.monarch, [factor(b2, q, b1 * r), factor(b1, b2 * r, p)]),
        (packed.blast, [factor(b2, q, rank), s, factor(b1, rank, p)]),
        (packed.pivoted, [factor(n, rank), factor(rank, k - rank), order]),
        (packed.dense, [factor(n, k)]),
    ):
        held = [(t, None, 0, t.shape[-1]) if isinstance(t, torch.Tensor) else t for t in tensors]
        run(x, *map(list, zip(*held, strict=True)), None, "")
    numbers.numbers(*factor(n, k), dtype)


def call_one_in_float8(n, k):
    """A dense layer in float8 on one token: cards differ in how they convert it."""
    codes, scale, bits, length = codes_of((n, k), 0, None)
    packed.dense(torch.empty(1, k, dtype=torch.bfloat16), [codes], [scale], [bits], [length], None, "")


def call_places(dtype, tokens, bits, group, n, rank):
    """The last stage of two layers whose outputs are multiplied, and a first stage of long rows, place by place."""
    u = weights_in_bits(*codes_of((2, n, rank), bits, group))
    expand_by_places(torch.empty(1, tokens, 2 * rank, dtype=dtype), u, None, torch.empty(tokens, n), "silu", True)
    # rows that programs share
    v = weights_in_bits(*codes_of((1, rank, n), bits, group))
    project_by_places(torch.empty(tokens, n, dtype=dtype), v, torch.empty(1, tokens, rank, dtype=dtype))


def call_places_in_groups(dtype, n, rank):
    """Both stages of int4 in groups at 16 tokens, whose steps follow each other without a loop."""
    x, z = torch.empty(16, n, dtype=dtype), torch.empty(1, 16, rank, dtype=dtype)
    project_by_places(x, weights_in_bits(*codes_of((1, rank, n), 4, 128)), z)
    expand_by_places(z, weights_in_bits(*codes_of((1, n, rank), 4, 128)), None, torch.empty(16, n, dtype=dtype))


def call_gated_one(bits, n, rank):
    """The last stage of two layers in bits, whose rows the warps have side by side."""
    z, u = torch.empty(1, 1, 2 * rank, dtype=torch.bfloat16), weights_in_bits(*codes_of((2, n, rank), bits, None))
    decode_one.expand_one(z, u, None, torch.empty(1, n, dtype=torch.bfloat16), "silu", gated=True)


def call_one_beside(bits, n, rank):
    """The last stage of layers whose neighbours' was launched before."""
    z, u = torch.empty(1, 1, rank, dtype=torch.bfloat16), weights_in_bits(*codes_of((1, n, rank), bits, None))
    decode_one.expand_one(z, u, None, torch.empty(1, n, dtype=torch.bfloat16), beside=True)


def call_plain(capability):
    """All launches of the plain format, and attention."""
    bf16, fp16 = torch.bfloat16, torch.float16
    for dtype, tokens, sizes, backward in (
        (bf16, 1, (4096, 4096, 1024, 4, 16), False),
        (bf16, 16, (4096, 11008, 1488, 16, 16), False),
        (bf16, 16, (4096, 4096, 1024, 4, 4), False),
        (bf16, 32, (11008, 4096, 1408, 4, 4), False),
        (bf16, 1024, (4096, 4096, 1024, 4, 16), False),
        (fp16, 48, (768, 3072, 192, 4, 4), False),
        (bf16, 1024, (4096, 4096, 1024, 4, 4), True),
        (bf16, 1024, (4096, 4096, 1024, 16, 16), True),
    ):
        call_ops(dtype, tokens, *sizes, backward)
    # one token of long rows, of many blocks and of float32
    for dtype, sizes in ((bf16, (11008, 4096, 1488, 16, 16)), (torch.float32, (768, 2304, 191, 6, 6))):
        call_ops(dtype, 1, *sizes, False)
    call_grouped(16, 4096, 4096, 1024, 4, 4)
    call_grouped(1024, 4096, 1024, 416, 4, 16)
    call_activated(4096, 11008, 1408, 4, 4)
    for tokens in (1, 32, 1024):
        call_pivoted(bf16, tokens, 4096, 4096, 992)
    # nothing that divides, one pivot, no others
    call_pivoted(fp16, 1, 767, 2304, 191, torch.int64)
    call_pivoted(bf16, 300, 768, 768, 1)
    call_pivoted(bf16, 300, 768, 768, 768)
    for sizes in ((16, 1, 11008, 1488), (2, 4, 2752, 1536), (16, 1, 8192, 824)):
        call_expand_wide(bf16, *sizes, DecodeConfig(8, 128, 4, 3, programs=1, ahead=3))
        call_expand_wide(fp16, *sizes, DecodeConfig(8, 64, 8, 2, programs=2))
    if capability == 86:
        # the tightest fit: the widest dtype, most decode tokens and least shared memory
        call_ops(torch.float32, 32, 768, 2304, 191, 6, 6, False)
        call_pivoted(torch.float32, 32, 768, 2304, 191)
    for sizes in ((1, 32, 1, 192, 128), (8, 8, 4, 1024, 128), (2, 1, 32, 4096, 80), (1, 12, 1, 50, 64)):
        call_attention(bf16, *sizes)
    call_attention(torch.float32, 2, 3, 2, 600, 256)
    call_losses(bf16, 2048, 49152)
    # groups of a block whose scales are chosen, in each format and of any number of rows, and one scale that is given
    upper, tried = torch.empty(8, 128, 128), torch.empty(24)
    for limits, rows, size in (((-8, 7), 72, 64), ((-4, 3), 64, 32), ((-2, 1), 1, 128), ((-128, 127), 9, 8)):
        rounding.round_columns(torch.empty(8, rows, 128), upper, *limits, False, size, tried[: size // 8])
    held = torch.empty(8, 72, 128)
    rounding.round_columns(held, upper, -448.0, 448.0, True, 128, tried[:1], torch.empty(8, 72, 1))
    call_experts(bf16, 8, 1, 438, 2048)
    call_experts(fp16, 128, 4, 384, 100, transposed=True)


def main(capability: int):
    JITFunction.run = catch
    # cuBLAS' part of a layer
    torch._scaled_mm = lambda *args, **kwargs: None
    for name, module in list(sys.modules.items()):
        if name.startswith("hf_blr.ops.triton.") and hasattr(module, "device_of"):
            module.device_of = lambda x: DEVICES[capability]
    # the oldest with float8 is in all else as 8.6
    if capability != 89:
        call_plain(capability)
        call_packed(*PACKED[capability])
        dtype, tokens, bits, group, *_ = PACKED[capability]
        call_experts(dtype, 8 * tokens, 1, 768, 2048, bits=bits, group=group)
        call_one_in_float8(4096, 1584)
        call_gated_one(bits, 14336, 1584)
        call_one_beside(bits, 1024, 400)
        call_places(torch.bfloat16, 32, bits, group and 128, 14336, 1536)
        call_places_in_groups(torch.bfloat16, 4096, 1024)
        call_places_in_groups(torch.bfloat16, 14336, 1536)
    if capability >= 89:
        call_float8(1024, 4096, 4096, 1024, 4, 4)
        call_float8(48, 4096, 4096, 1024, 16, 16)
        call_float8(4096, 14336, 4096, 1536, 4, 4)
    seen = set()
    for kernel, args, kwargs in launches:
        compiled = compile_launch(kernel, args, kwargs, capability)
        if compiled.hash in seen:
            continue
        seen.add(compiled.hash)
        ptx = compiled.asm["ptx"]
        row = {
            "kernel": kernel.__name__,
            "shared": compiled.metadata.shared,
            "limit": DEVICES[capability].shared_memory,
            "wgmma": ptx.count("wgmma.mma_async"),
            "wgmma_float8": len(re.findall(r"wgmma\.mma_async\S*e4m3\.e4m3", ptx)),
            "mma": ptx.count("mma.sync"),
            "policies": ptx.count("createpolicy"),
            "barriers": ptx.count("bar.sync"),
            "gated": kwargs.get("GATED", False),
            "beside": kwargs.get("BESIDE", False),
            "waits_last": ptx.rfind("griddepcontrol.wait") > ptx.rfind("st.global"),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
