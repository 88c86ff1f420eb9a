"""The two losses of nano's training: patches against texts, and answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ppllava_edge.nano.data import Batch, decoder_sequences
from ppllava_edge.nano.model import NanoPPLLaVA
from ppllava_edge.nano.vocabulary import END, GROUPS, TEXT_ID, TEXTS, WORD_ID, encode
from ppllava_edge.nano.world import MOTION_NAMES, SHAPE_NAMES

_ENCODED = [encode(text.words) for text in TEXTS]
TEXT_ENDS = torch.tensor([len(ids) for ids in _ENCODED])
TEXT_IDS = torch.zeros(len(TEXTS), int(TEXT_ENDS.max()) + 1, dtype=torch.long)
for _row, _ids in enumerate(_ENCODED):
    TEXT_IDS[_row, : len(_ids) + 1] = torch.tensor([*_ids, WORD_ID[END]])

# The referent of each text: (texts, 3) colour, shape, motion; -1 where the text says nothing.
_REFERENT = torch.tensor([(t.color, t.shape, t.motion) for t in TEXTS])
_NAMES_MOTION = _REFERENT[:, 2] >= 0
_IS_POSITION = torch.zeros(len(TEXTS), dtype=torch.bool)
_IS_POSITION[torch.from_numpy(GROUPS["row"])] = True
_IS_POSITION[torch.from_numpy(GROUPS["column"])] = True
FIRST = TEXT_ID["which object appears first ?"]
LAST = TEXT_ID["which object appears last ?"]

_S = len(SHAPE_NAMES)
_M = len(MOTION_NAMES)
# Which text of a group names an object of colour c, shape s, motion m (the groups are in this order).
_INDEX_IN_GROUP = {
    "color": lambda c, s, m: c,
    "shape": lambda c, s, m: s,
    "motion": lambda c, s, m: m,
    "color shape": lambda c, s, m: c * _S + s,
    "color shape motion": lambda c, s, m: (c * _S + s) * _M + m,
    "ask color": lambda c, s, m: s,
    "ask shape": lambda c, s, m: c,
    "which direction does the {} move ?": lambda c, s, m: c * _S + s,
    "is there a {} ?": lambda c, s, m: c * _S + s,
    "where is the {} ?": lambda c, s, m: c * _S + s,
}
_NEEDS_TIME = {"motion", "color shape motion"}


def referents(batch: Batch) -> Tensor:
    """Whether each patch shows an object that each text refers to: (B, texts, T*P), 0 or 1."""
    matches = torch.ones(len(batch.colors), len(TEXTS), batch.colors.shape[1], dtype=torch.bool)
    for k, attribute in enumerate((batch.colors, batch.shapes, batch.motions)):
        wanted = _REFERENT[None, :, k, None]
        matches &= (attribute[:, None] == wanted) | (wanted < 0)
    matches &= (batch.colors >= 0)[:, None]
    hit = batch.hit.float()
    shown = (matches.float() @ hit).clamp(max=1)
    for text, which in ((FIRST, batch.first), (LAST, batch.last)):
        chosen = hit[torch.arange(len(hit)), which.clamp(min=0)]
        shown[:, text] = torch.where((which >= 0)[:, None], chosen, shown[:, text])
    return shown


def contrastive_loss(
    logits: Tensor, batch: Batch, single: bool = False, motion_weight: float = 4.0
) -> tuple[Tensor, dict[str, float]]:
    """CLIP's loss at the level of patches, in both directions.

    Args:
        logits: (B, texts, T*P), cosine × scale.
        batch: The ground truth.
        single: The clips are single frames: texts about motion don't count.
        motion_weight: Weight of the group of motion texts.

    Returns:
        The loss, and figures for the log: accuracy by group, and the loss from text to patch.
    """
    text_to_patch = _text_to_patch(logits, batch, single)
    losses, accuracy = _patch_to_text(logits, batch, single, motion_weight)
    figures = {**accuracy, "text to patch": float(text_to_patch.detach())}
    return torch.stack(losses).mean() + 0.5 * text_to_patch, figures


def _text_to_patch(logits: Tensor, batch: Batch, single: bool) -> Tensor:
    """For each text, the softmax over all patches (it also guides the pooling) against its referent."""
    shown = referents(batch)
    count = shown.sum(-1)
    counted = (count > 0) & ~_IS_POSITION
    if single:
        counted &= ~_NAMES_MOTION
    log_share = torch.log_softmax(logits[counted], -1)
    shown = shown[counted]
    count = count[counted]
    return (-torch.linalg.vecdot(log_share, shown) / count - count.log()).mean()


def _patch_to_text(
    logits: Tensor, batch: Batch, single: bool, motion_weight: float
) -> tuple[list[Tensor], dict[str, float]]:
    """For each patch that shows an object, score the choice of the right text within each group of texts."""
    owned = batch.owner >= 0
    owner = batch.owner.clamp(min=0)
    color, shape, motion = (
        torch.gather(a, 1, owner)[owned] for a in (batch.colors, batch.shapes, batch.motions)
    )
    of_patch = logits.transpose(1, 2)[owned]  # (owned patches, texts)
    losses: list[Tensor] = []
    accuracy: dict[str, float] = {}
    for group, index in _INDEX_IN_GROUP.items():
        if single and group in _NEEDS_TIME:
            continue
        scores = of_patch[:, torch.from_numpy(GROUPS[group])]
        target = index(color, shape, motion)
        losses.append(F.cross_entropy(scores, target) * (motion_weight if group == "motion" else 1.0))
        accuracy[group] = float((scores.argmax(1) == target).float().mean())
    patches = logits.shape[-1] // batch.row.shape[-1]
    for axis, bins in (("row", batch.row), ("column", batch.column)):
        target = torch.gather(bins.repeat_interleave(patches, -1), 1, owner[:, None])[:, 0][owned]
        scores = of_patch[:, torch.from_numpy(GROUPS[axis])]
        losses.append(F.cross_entropy(scores, target))
        accuracy[axis] = float((scores.argmax(1) == target).float().mean())
    if not single:
        is_first = owner == batch.first[:, None]
        is_last = owner == batch.last[:, None]
        ends = (is_first | is_last) & owned
        if ends.any():
            scores = logits[:, [FIRST, LAST]].transpose(1, 2)[ends]
            losses.append(2 * F.cross_entropy(scores, is_last[ends].long()))
    return losses, accuracy


def answer_loss(
    model: NanoPPLLaVA, features: Tensor, patches: Tensor, texts: Tensor, batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy on the answers' tokens; the vision tower has run once per clip.

    Args:
        model: The model.
        features: (B, T, P, D) of the clips.
        patches: (B, T*P, E), the normalised patch embeddings.
        texts: (texts, E), the normalised embeddings of all texts.
        batch: The questions.

    Returns:
        The loss, in which short answers and descriptions weigh the same; for each question whether all its
        tokens were predicted right, (B*K) bool, which equals greedy exact match; and its kind, (B*K).
    """
    clips, count = batch.text.shape
    logits = torch.einsum("bvd,bkd->bkv", patches, texts[batch.text]) * model.logit_scale.float().exp()
    visual = model.pool(features, logits).unflatten(0, (clips, count))
    loss = torch.zeros(())
    right = torch.zeros(clips, count, dtype=torch.bool)
    for columns in (slice(0, count - 1), slice(count - 1, count)):  # short answers, then descriptions
        asked = batch.text[:, columns].flatten().tolist()
        answers = [answer for row in batch.answers for answer in row[columns]]
        ids, labels = decoder_sequences([_ENCODED[t] for t in asked], answers)
        scores = model.decode(visual[:, columns].flatten(0, 1), ids)
        loss = loss + F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=-100)
        right[:, columns] = ((scores.argmax(-1) == labels) | (labels < 0)).all(1).view(clips, -1)
    return loss, right.flatten(), batch.kinds.flatten()
