"""Losses of rows of logits, and their gradients: see `ops.losses`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: logits that a program holds at a time, and its warps
BV, WARPS = 4096, 8


@triton.jit
def losses_kernel(
    student_ptr,
    teacher_ptr,
    label_ptr,
    losses_ptr,
    logs_ptr,
    T,
    V,
    stride_st,
    stride_tt,
    SHARPNESS,
    BV: tl.constexpr,
):
    """The two losses of a row, and the three logarithms of sums of exponentials that its gradient needs."""
    i_t = tl.program_id(0).to(tl.int64)
    student_ptr += i_t * stride_st
    teacher_ptr += i_t * stride_tt
    b_most_s = tl.full((BV,), float("-inf"), tl.float32)
    b_most_t = tl.full((BV,), float("-inf"), tl.float32)
    for i in range(0, V, BV):
        o_v = i + tl.arange(0, BV)
        b_s = tl.load(student_ptr + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
        b_t = tl.load(teacher_ptr + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
        b_most_s = tl.maximum(b_most_s, b_s)
        b_most_t = tl.maximum(b_most_t, b_t)
    most_s, most_t = tl.max(b_most_s, 0), tl.max(b_most_t, 0)
    b_own = tl.zeros((BV,), tl.float32)
    b_sum_s = tl.zeros((BV,), tl.float32)
    b_sum_t = tl.zeros((BV,), tl.float32)
    b_apart = tl.zeros((BV,), tl.float32)
    for i in range(0, V, BV):
        o_v = i + tl.arange(0, BV)
        b_s = tl.load(student_ptr + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32) - most_s
        b_t = (tl.load(teacher_ptr + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32) - most_t) * SHARPNESS
        b_own += tl.exp(b_s)
        b_s = b_s * SHARPNESS
        b_p = tl.exp(b_t)
        b_sum_s += tl.exp(b_s)
        b_sum_t += b_p
        # what the teacher excludes costs nothing, and is no number times zero
        b_apart += tl.where(b_p == 0, 0.0, b_p * (b_t - b_s))
    log_own, log_s, log_t = tl.log(tl.sum(b_own, 0)), tl.log(tl.sum(b_sum_s, 0)), tl.log(tl.sum(b_sum_t, 0))
    label = tl.load(label_ptr + i_t)
    chosen = tl.load(student_ptr + label, mask=label >= 0, other=0.0).to(tl.float32)
    tl.store(losses_ptr + i_t, tl.where(label >= 0, log_own + most_s - chosen, 0.0))
    tl.store(losses_ptr + T + i_t, tl.sum(b_apart, 0) / tl.sum(b_sum_t, 0) - log_t + log_s)
    tl.store(logs_ptr + i_t, log_own + most_s)
    tl.store(logs_ptr + T + i_t, log_s + most_s * SHARPNESS)
    tl.store(logs_ptr + 2 * T + i_t, log_t + most_t * SHARPNESS)


@triton.jit
def losses_backward_kernel(
    student_ptr,
    teacher_ptr,
    label_ptr,
    logs_ptr,
    grads_ptr,
    out_ptr,
    T,
    V,
    stride_st,
    stride_tt,
    stride_ot,
    SHARPNESS,
    BV: tl.constexpr,
):
    """The gradient by some of a row's logits; zeros where a row does not count, whatever stands in it."""
    i_t = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_v = o_v < V
    label = tl.load(label_ptr + i_t)
    g_own = tl.where(label >= 0, tl.load(grads_ptr + i_t), 0.0)
    g_apart = tl.load(grads_ptr + T + i_t) * SHARPNESS
    out_ptr += i_t * stride_ot
    b_out = tl.zeros((BV,), tl.float32)
    if (g_own != 0) | (g_apart != 0):
        b_s = tl.load(student_ptr + i_t * stride_st + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_t = tl.load(teacher_ptr + i_t * stride_tt + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_own = tl.exp(b_s - tl.load(logs_ptr + i_t)) - (o_v == label).to(tl.float32)
        b_p = tl.exp(b_t * SHARPNESS - tl.load(logs_ptr + 2 * T + i_t))
        b_q = tl.exp(b_s * SHARPNESS - tl.load(logs_ptr + T + i_t))
        b_out = g_own * b_own + g_apart * (b_q - b_p)
    tl.store(out_ptr + o_v, b_out.to(out_ptr.dtype.element_ty), mask=m_v)


def losses(student, teacher, labels, sharpness):
    """(losses `[2, T]`, logarithms `[3, T]`), float32."""
    rows, v = student.shape
    found, logs = (student.new_empty(n, rows, dtype=torch.float32) for n in (2, 3))
    if rows:
        losses_kernel[(rows,)](
            student, teacher, labels.contiguous(), found, logs, rows, v, student.stride(0), teacher.stride(0),
            sharpness, BV=BV, num_warps=WARPS,
        )  # fmt: skip
    return found, logs


def losses_backward(student, teacher, labels, logs, grads, sharpness):
    """The gradient by the student's logits `[T, V]`, in their dtype."""
    rows, v = student.shape
    out = torch.empty_like(student)
    if rows:
        losses_backward_kernel[(rows, triton.cdiv(v, BV))](
            student, teacher, labels.contiguous(), logs, grads, out, rows, v, student.stride(0), teacher.stride(0),
            out.stride(0), sharpness, BV=BV, num_warps=WARPS,
        )  # fmt: skip
    return out
