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

_REFERENT = torch.tensor([(t.color, t.shape, t.motion) for t in TEXTS])
_NAMES_MOTION = _REFERENT[:, 2] >= 0
_IS_POSITION = torch.zeros(len(TEXTS), dtype=torch.bool)
_IS_POSITION[torch.from_numpy(GROUPS["row"])] = True
_IS_POSITION[torch.from_numpy(GROUPS["column"])] = True
FIRST, LAST = TEXT_ID["which object appears first ?"], TEXT_ID["which object appears last ?"]

_S, _M = len(SHAPE_NAMES), len(MOTION_NAMES)
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
    """(B, texts, T*P) float: does this patch show what this text refers to?"""
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
    """CLIP's loss at the level of patches. logits (B, texts, T*P): cosine × scale.

    Patch → text: within every group of texts, which one names the object under the patch. Text → patch: the softmax over all T*P
    patches (the very one that guides the pooling) against the patches that show the referent.
    """
    shown = referents(batch)
    count = shown.sum(-1)
    counted = (count > 0) & ~_IS_POSITION
    if single:
        counted &= ~_NAMES_MOTION
    log_share, shown, count = torch.log_softmax(logits[counted], -1), shown[counted], count[counted]
    text_to_patch = (-torch.linalg.vecdot(log_share, shown) / count - count.log()).mean()

    owned = batch.owner >= 0
    owner = batch.owner.clamp(min=0)
    color, shape, motion = (
        torch.gather(a, 1, owner)[owned] for a in (batch.colors, batch.shapes, batch.motions)
    )
    of_patch = logits.transpose(1, 2)[owned]  # (owned patches, texts)
    losses, accuracy = [], {}
    for group, index in _INDEX_IN_GROUP.items():
        if single and group in _NEEDS_TIME:
            continue
        scores, target = of_patch[:, torch.from_numpy(GROUPS[group])], index(color, shape, motion)
        losses.append(F.cross_entropy(scores, target) * (motion_weight if group == "motion" else 1.0))
        accuracy[group] = float((scores.argmax(1) == target).float().mean())
    patches = logits.shape[-1] // batch.row.shape[-1]
    for axis, bins in (("row", batch.row), ("column", batch.column)):
        target = torch.gather(bins.repeat_interleave(patches, -1), 1, owner[:, None])[:, 0][owned]
        scores = of_patch[:, torch.from_numpy(GROUPS[axis])]
        losses.append(F.cross_entropy(scores, target))
        accuracy[axis] = float((scores.argmax(1) == target).float().mean())
    if not single:
        is_first, is_last = owner == batch.first[:, None], owner == batch.last[:, None]
        ends = (is_first | is_last) & owned
        if ends.any():
            scores = logits[:, [FIRST, LAST]].transpose(1, 2)[ends]
            losses.append(2 * F.cross_entropy(scores, is_last[ends].long()))
    return torch.stack(losses).mean() + 0.5 * text_to_patch, {
        **accuracy,
        "text to patch": float(text_to_patch.detach()),
    }


def answer_loss(
    model: NanoPPLLaVA, features: Tensor, patches: Tensor, texts: Tensor, batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy on the answers' tokens only; the vision tower ran once per clip.

    Returns the loss (short answers and descriptions weigh the same), and for every question whether each of its tokens was
    predicted right (B*K bool: equals greedy exact match), and its kind (B*K).
    """
    clips, count = batch.text.shape
    logits = torch.einsum("bvd,bkd->bkv", patches, texts[batch.text]) * model.logit_scale.float().exp()
    visual = model.pool(features, logits).unflatten(0, (clips, count))
    loss, right = torch.zeros(()), torch.zeros(clips, count, dtype=torch.bool)
    for columns in (slice(0, count - 1), slice(count - 1, count)):
        asked = batch.text[:, columns].flatten().tolist()
        answers = [answer for row in batch.answers for answer in row[columns]]
        ids, labels = decoder_sequences([_ENCODED[t] for t in asked], answers)
        scores = model.decode(visual[:, columns].flatten(0, 1), ids)
        loss = loss + F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=-100)
        right[:, columns] = ((scores.argmax(-1) == labels) | (labels < 0)).all(1).view(clips, -1)
    return loss, right.flatten(), batch.kinds.flatten()
