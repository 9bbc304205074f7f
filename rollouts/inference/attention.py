"""Attention of a step's tokens over the paged cache, in torch operators that run on every device.

A step holds D decoding tokens, one a row, and then chunks of prompts, each a run of tokens of one row. Shapes: T tokens
of the step, H query heads, K key/value heads, G = H/K, d head width, s tokens a page, N pages that decoding rows read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Chunk:
    """Tokens [first, first + length) of the step: positions [context, context + length) of one row."""

    first: int
    length: int
    context: int
    pages: torch.Tensor  # pages of the row up to the end of the chunk


@dataclass(frozen=True)
class Reads:
    """Every pair of a decoding token and a page that it attends to."""

    rows: torch.Tensor  # [N] int64, which decoding token
    pages: torch.Tensor  # [N] int64
    starts: torch.Tensor  # [N] int64, position of the page's first token


@dataclass(frozen=True)
class Step:
    """The tokens that one forward pass computes and where their keys and values belong."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    pages: torch.Tensor  # [T] int64, page of each token
    offsets: torch.Tensor  # [T] int64, place in that page
    rows: torch.Tensor  # [T] int64, row of each token
    num_decode: int  # D
    reads: Reads | None
    chunks: list[Chunk]
    outputs: torch.Tensor  # [B] int64, tokens whose logits are wanted
    table: torch.Tensor | None = None  # [D, M] int64, pages of each decoding token's row, in the place of ``reads``


def write_cache(keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
    """Put key and value [T, K, d] of the step's tokens into one layer's pages."""
    keys.transpose(2, 3).transpose(1, 2)[step.pages, step.offsets] = key  # as [P, s, K, d]
    values.transpose(1, 2)[step.pages, step.offsets] = value


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    step: Step,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Write the step's keys and values, then attend: query [T, H, d], key and value [T, K, d] -> [T, H, d].

    ``window`` limits each token to the last so many positions, itself included.
    """
    write_cache(keys, values, key, value, step)
    if step.table is not None:
        return table_attention(query, keys, values, step.table, step.positions, scale, window)
    out = torch.empty_like(query)
    if step.num_decode:
        out[: step.num_decode] = decode_attention(query[: step.num_decode], keys, values, step, scale, window)
    for chunk in step.chunks:
        part = slice(chunk.first, chunk.first + chunk.length)
        out[part] = chunk_attention(query[part], key[part], value[part], keys, values, chunk, scale, window)
    return out


def decode_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: Step, scale: float, window: int | None
) -> torch.Tensor:
    """One token a row over all that the row has cached; rows of any lengths, no padding beyond the last page.

    Works page by page: scores and weighted values of every (row, page) pair, then sums over the pages of each row.
    query [D, H, d] -> [D, H, d].
    """
    num_rows, num_heads, width = query.shape
    num_kv_heads, size = keys.shape[1], keys.shape[3]
    assert step.reads is not None
    rows, starts = step.reads.rows, step.reads.starts
    grouped = query.view(num_rows, num_kv_heads, -1, width)[rows].float()  # [N, K, G, d]
    scores = torch.matmul(grouped, keys[step.reads.pages].float()) * scale  # [N, K, G, s]
    last = step.positions[: step.num_decode][rows]  # [N]
    behind = last[:, None] - starts[:, None] - torch.arange(size, device=query.device)  # [N, s] positions to look back
    hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
    scores.masked_fill_(hidden[:, None, None], float("-inf"))
    shape = (num_rows, *scores.shape[1:3])  # [D, K, G]
    index = rows[:, None, None].expand(scores.shape[:3])
    highest = scores.new_full(shape, float("-inf")).scatter_reduce(0, index, scores.amax(-1), "amax")
    weights = (scores - highest[rows][..., None]).exp()
    total = scores.new_zeros(shape).index_add_(0, rows, weights.sum(-1))
    summed = scores.new_zeros(*shape, width).index_add_(
        0, rows, torch.matmul(weights, values[step.reads.pages].float())
    )
    return (summed / total[..., None]).view(num_rows, num_heads, width).to(query.dtype)


def table_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """As ``decode_attention``, in shapes that do not depend on the lengths: query [D, H, d], table [D, M] -> [D, H, d].

    What lies in the table beyond a row's last page is hidden, as are the places behind it in that page.
    """
    num_kv_heads, width = keys.shape[1:3]
    heads = torch.arange(num_kv_heads, device=query.device)[:, None]
    key = keys.transpose(2, 3)[table[:, None], heads].flatten(2, 3)  # [D, K, M * s, d]
    value = values[table[:, None], heads].flatten(2, 3)
    behind = positions[:, None] - torch.arange(key.shape[2], device=query.device)  # [D, M * s] positions to look back
    visible = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    grouped = query.view(len(query), num_kv_heads, -1, width)  # the queries that share a key head are its G queries
    mask = visible[:, None, None].expand(-1, num_kv_heads, grouped.shape[2], -1)
    return F.scaled_dot_product_attention(grouped, key, value, mask, scale=scale).reshape(query.shape)


def chunk_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    chunk: Chunk,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """A run of prompt tokens over its row's cache and itself: query [c, H, d], key and value [c, K, d] -> [c, H, d]."""
    end = chunk.context + chunk.length
    if chunk.context:
        pages = keys[chunk.pages]  # [n, K, d, s]
        key = pages.permute(0, 3, 1, 2).reshape(-1, *key.shape[1:])[:end]
        value = values[chunk.pages].transpose(1, 2).reshape(-1, *value.shape[1:])[:end]
    mask = None
    if chunk.context or (window is not None and window < end):
        behind = (
            torch.arange(chunk.context, end, device=query.device)[:, None]
            - torch.arange(end, device=query.device)[None, :]
        )
        mask = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    dtype = query.dtype
    if query.device.type == "cpu" and dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported():
        query, key, value = query.float(), key.float(), value.float()  # up to 3x faster without a matrix unit
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1).to(dtype)
