"""The one place that finds the `[SEG]` embedding and the image it speaks of."""

import torch


def gather_seg_states(
    hidden_states: torch.Tensor, next_tokens: torch.LongTensor, seg_token_id: int
) -> tuple[torch.Tensor, torch.LongTensor, torch.LongTensor]:
    """
    The `[SEG]` embedding is the last hidden state that *predicts* `[SEG]`: the one before it, in training (teacher
    forcing) and in generation alike.

    Args:
        hidden_states: `(batch, length, hidden)`; `hidden_states[:, t]` predicted `next_tokens[:, t]`.
        next_tokens: `(batch, length)`.

    Returns:
        States `(total_masks, hidden)` in reading order, their rows `(total_masks,)` and the positions `(total_masks,)`
        of the predicting states.
    """
    is_seg = next_tokens == seg_token_id
    rows, positions = is_seg.nonzero(as_tuple=True)
    return hidden_states[is_seg], rows, positions


def image_index_of_seg(
    input_ids: torch.LongTensor,
    image_token_id: int,
    tokens_per_image: int,
    rows: torch.LongTensor,
    positions: torch.LongTensor,
) -> torch.LongTensor:
    """
    Index (over all images of the batch, in reading order) of the last image before each position of `input_ids`.

    Raises `ValueError` for a position that no image of its row precedes.
    """
    seen_in_row = (input_ids == image_token_id).long().cumsum(dim=1) // tokens_per_image
    seen_before_row = seen_in_row[:, -1].cumsum(dim=0) - seen_in_row[:, -1]
    seen = seen_in_row[rows, positions]
    if not bool((seen > 0).all()):
        row, count = int(rows[seen == 0][0]), int((seen == 0).sum())
        raise ValueError(f"row {row} holds a [SEG] but no image before it; {count} of {len(seen)} masks have no image")
    return seen_before_row[rows] + seen - 1
