"""Faults of a character or a word, each of which the kernels' tests must catch.

A check of the tests: `make kernel-faults` puts each one into a copy of the kernels and expects the
tests of that kernel to fail. `tests/project/test_kernel_faults.py` keeps the list true.
"""

FAULTS: dict[str, list[tuple[str, str]]] = {
    "exit_gate": [
        ("(1.0 - left >= limit)", "(1.0 - left > limit)"),
        ("(limit < 1.0)", "(limit <= 1.0)"),
        ("(n >= tl.load(min_loops + row))", "(n > tl.load(min_loops + row))"),
        ("(n >= tl.load(max_loops + row))", "(n > tl.load(max_loops + row))"),
        ("last = n >= total_loops", "last = n > total_loops"),
        ("tl.load(survival + row) * (1.0 - gate)", "tl.load(survival + row) * gate"),
        ("reads = fires & (seen == 0)", "reads = fires"),
        ("row * history_stride + done, left", "row * history_stride + n, left"),
        ("tl.load(active + row) == 0", "tl.load(active + row) == 1"),
        ("tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
        ("if exit_mask is None:", "if read_mask is None:"),
    ],
    "next_pass": [
        ("position += 1", "position += 2"),
        ("tl.store(survival + row, 1.0)", "tl.store(survival + row, 0.0)"),
        ("position >= tl.load(position_limit", "position > tl.load(position_limit"),
        ("length = (position + 1)", "length = (position + 0)"),
        ("copies = total_loops - 1 - t", "copies = total_loops - t"),
        ("slot = position * 0 - 1", "slot = position * 0"),
        ("mask = entry <= last", "mask = entry < last"),
        ("tl.load(tokens + row).to(tl.int64) * embedding_stride", "row * embedding_stride"),
        ("tl.load(tokens + row).to(tl.int64)", "tl.load(tokens + row)"),
        ("row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
        ("tl.load(table + last).to(tl.int64)", "tl.load(table + last)"),
        ("tl.store(hidden + row * hidden_stride", "tl.store(hidden + row * embedding_stride"),
        ("value, mask=col < size)", "value)"),
    ],
    "read_out": [
        ("tl.max(read, axis=0) != 0", "tl.min(read, axis=0) != 0"),
        ("tl.max(read, axis=0) != 0", "tl.max(read, axis=0) >= 0"),
        ("(read != 0)[:, None] & inside", "(row < rows)[:, None] & inside"),
        ("inside = first + col < size", "inside = col < size"),
        ("(entry < vocab)[None, :] & inside", "(entry < vocab)[None, :] | inside"),
        ("total = tl.dot(a, b, total", "total = tl.dot(a, b, total * 0"),
        ("mask=row < rows, other=0)", "mask=row < rows, other=1)"),
        ("row.to(tl.int64)[:, None] * hidden_stride", "row[:, None] * hidden_stride"),
        ("entry.to(tl.int64)[None, :] * weight_stride", "entry[None, :] * weight_stride"),
        ("right += BLOCK_K", "right += 1"),
    ],
    "rope_kv_write": [
        ("if slot < 0:", "if slot <= 0:"),
        ("if slot < 0:", "if slot < -1:"),
        (
            "(low * cos - high * sin).to(dtype), mask=mask)",
            "(low * cos + high * sin).to(dtype), mask=mask)",
        ),
        ("for _ in range(copies + 1):", "for _ in range(copies):"),
        ("v_to += v_stride_page", "v_to += k_stride_offset"),
        ("x.to(tl.float32) / tl.load(scale)", "x.to(tl.float32) * tl.load(scale)"),
        ("(head[:, None] < KV_HEADS)", "(head[:, None] < KV_HEADS - 1)"),
        ("page = slot // block_size", "page = (slot + 1) // block_size"),
        ("v_to += v_stride_page", "v_to += k_stride_page"),
        ("(head[:, None] < Q_HEADS)", "(head[:, None] <= Q_HEADS)"),
        ("(low * cos - high * sin).to(dtype), k_scale", "(low * cos - high * sin), k_scale"),
        ("tl.load(positions + row).to(tl.int64)", "tl.load(positions + row)"),
        ("head64 = head.to(tl.int64)[:, None]", "head64 = head[:, None]"),
    ],
    "sandwich_norm": [
        ("tl.sum(x * x, axis=0) / size + eps", "tl.sum(x * x, axis=0) / size"),
        (
            "r = (r + _norm(x, post, size, eps, dtype)).to(dtype)\n",
            "r = (r - _norm(x, post, size, eps, dtype)).to(dtype)\n",
        ),
        ("h = _norm(r, final, size, eps, dtype)", "h = _norm(r, post, size, eps, dtype)"),
        ("((x * scale).to(dtype).to(tl.float32) * weight)", "((x * scale) * weight)"),
        ("size, eps, dtype)).to(dtype).to(tl.float32)", "size, eps, dtype))"),
        ("size, eps, dtype).to(dtype), mask=mask)", "size, eps, dtype).to(dtype))"),
        ("tl.store(stream, h.to(dtype), mask=mask)", "tl.store(stream, h.to(dtype))"),
        (
            "eps, BLOCK: tl.constexpr):\n    row = tl.program_id(0).to(tl.int64)",
            "eps, BLOCK: tl.constexpr):\n    row = tl.program_id(0)",
        ),
    ],
    "standin_fill": [
        ("if (slot < 0) | (leaves == 0):", "if (slot <= 0) | (leaves == 0):"),
        ("if (slot < 0) | (leaves == 0):", "if slot < 0:"),
        (
            "copies = total_loops - 1 - tl.load(loop + row)",
            "copies = total_loops - tl.load(loop + row)",
        ),
        ("if copies <= 0:", "if copies <= 1:"),
        ("mask = (head < HEADS) & (col < D)", "mask = (head < HEADS) & (col < D - 1)"),
        ("layer = tl.program_id(1)", "layer = tl.program_id(0)"),
        ("_copy(v, v_at, v_stride_page,", "_copy(v, v_at, k_stride_page,"),
        ("(col < D)", "(col <= D)"),
        ("tl.arange(0, GROUP)).to(tl.int64)", "tl.arange(0, GROUP))"),
    ],
    "loop_decode_attention": [
        ("return block * total_loops + loop,", "return block * total_loops,"),
        ("tl.minimum(length, start + tiles * BLOCK_N)", "start + tiles * BLOCK_N"),
        ("(position % block_size).to(tl.int64)", "position % block_size"),
        ("(member[:, None] < GROUP)", "(member[:, None] <= GROUP)"),
        (
            'tl.where(valid, tl.sum(k * query, axis=1), -float("inf"))',
            "tl.where(valid, tl.sum(k * query, axis=1), 0.0)",
        ),
        ("tl.store(log_sums + at, best + tl.log2(mass))", "tl.store(log_sums + at, best)"),
        (
            "tl.store(log_sums + at, top + tl.log2(total), mask=member < GROUP)",
            "tl.store(log_sums + at, top, mask=member < GROUP)",
        ),
        ("head = kv_head * GROUP + member", "head = kv_head + member"),
        (
            'score = tl.where(valid[None, :], score, -float("inf"))',
            "score = tl.where(valid[None, :], score, 0.0)",
        ),
    ],
}
"""Kernel -> (what its `triton.py` says, what it must not)."""
