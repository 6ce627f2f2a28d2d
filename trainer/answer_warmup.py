"""
Second stage of training from fresh parts: the language model learns its answers, and to look before it gives them.

Conversations about one picture share its image tokens: each sees the picture and itself alone, at the positions it would
have by itself. A question then costs its own words and not the picture again, so that an hour on a CPU reads several times
as many as a joint run does. The loss is the cross entropy of the answers, plus the binary cross entropy of refusing, read
from the first token of the answer ("Sure, ..." or "Sorry, ..."): it is one token of some forty, which cross entropy alone
teaches last and by chance. LoRA and the image projector train; the mask path stands still.
"""

from __future__ import annotations

import os
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from torch import nn

from mglmm.modeling_mglmm import MglmmForConditionalGeneration, MglmmImageFeatures
from mglmm.processing import MglmmProcessor
from mglmm.processing.uscdf import IMAGE_TOKEN, SEG_TOKEN, conversation_of

from .feature_cache import FeatureCache

Kind = Literal["refused", "answered", "described", "other"]
SINGLE_TASKS = ("referring", "absent")  # of one question: answered with masks or refused
LEFT_OUT = ("region",)  # what boxes show is not among the image tokens that the conversations share
DESCRIPTIONS = ("panoptic", "fine", "grounded_caption")
# Of the conversations of a picture. A description is much longer than a question, and learned more slowly.
SHARES: dict[Kind, float] = {"refused": 3 / 8, "answered": 3 / 8, "described": 1 / 8, "other": 1 / 8}
MAX_PACKED = 640  # tokens of a picture with its conversations; one that does not fit any more is left out of the draw
DECISIVE = 3  # times as often before one kind of answer as before the other: then a token decides
REFUSAL_WEIGHT = 0.5  # of the binary cross entropy beside the cross entropy


class ImageConversations(torch.utils.data.Dataset):
    """
    The pictures of USCDF rows with the conversations about each, by kind: single questions that are refused, single
    questions that are answered with masks, descriptions, and all others (several turns, captions).

    Args:
        source_repeats: How often the pictures of a source come in an epoch, 1 where not named.

    Raises `ValueError` if no single question is refused, or none is answered.
    """

    def __init__(self, rows: Dataset, source_repeats: Mapping[str, int] | None = None):
        self.rows = rows
        self.openings: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
        conversations: dict[tuple[str, str], dict[Kind, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.messages = rows["messages"]
        for index, row in enumerate(rows.select_columns(["source", "image_id", "task", "messages"])):
            if row["task"] in LEFT_OUT or IMAGE_TOKEN not in row["messages"][0]["content"]:
                continue
            kind: Kind = "described" if row["task"] in DESCRIPTIONS else "other"
            if row["task"] in SINGLE_TASKS and len(row["messages"]) == 2:
                answer = row["messages"][1]["content"]
                kind = "answered" if SEG_TOKEN in answer else "refused"
                self.openings[kind == "refused"][" ".join(answer.split()[:3])] += 1
            conversations[row["source"], row["image_id"]][kind].append(index)
        if not (self.openings[True] and self.openings[False]):
            raise ValueError(
                f"{len(rows)} rows hold {self.openings[True].total()} refused and {self.openings[False].total()} answered "
                "single questions: the answer warm-up needs both; leave it out or add rows of absent things"
            )
        repeats = source_repeats or {}
        self.images = [image for image in sorted(conversations.items()) for _ in range(repeats.get(image[0][0], 1))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        _, kinds = self.images[index]
        first = next(rows[0] for rows in kinds.values())
        conversations = {kind: [self.messages[row] for row in rows] for kind, rows in kinds.items()}
        return {"image": self.rows[first]["image"], "conversations": conversations}


class Decision(NamedTuple):
    """
    Where and by which tokens it is decided whether to refuse.

    Attributes:
        prefix: Ids with which every answer begins, often none.
        refusing, answering: Ids of the tokens after them that begin refusals, and answers with masks.
    """

    prefix: list[int]
    refusing: torch.LongTensor
    answering: torch.LongTensor


def deciding_tokens(processor: MglmmProcessor, openings: dict[bool, Counter[str]]) -> Decision:
    """
    Args:
        openings: First words of the refusals (`True`) and of the other answers (`False`) with their numbers.

    Raises `ValueError` if no token tells the two apart.
    """
    answers: dict[bool, list[tuple[list[int], float]]] = {}
    for refused, texts in openings.items():
        answers[refused] = []
        for text, count in texts.items():
            conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
            inputs = processor.apply_chat_template(
                [conversation], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, mask = inputs["input_ids"][0], inputs["assistant_masks"][0]
            own = [token for token, generated in zip(ids, mask, strict=True) if generated]
            answers[refused].append((own, count / texts.total()))
    prefix = list(os.path.commonprefix([own for group in answers.values() for own, _ in group]))
    shares: dict[bool, Counter[int]] = {kind: Counter() for kind in answers}
    for kind, group in answers.items():
        for own, share in group:
            shares[kind][own[len(prefix)]] += share  # type: ignore[assignment]
    refusing, answering = (
        sorted(token for token in shares[kind] if shares[kind][token] > DECISIVE * shares[not kind][token])
        for kind in (True, False)
    )
    if not (refusing and answering):
        raise ValueError("refusals and answers begin with the same words: the answer warm-up cannot tell them apart")
    return Decision(prefix, cast(Any, torch.tensor(refusing)), cast(Any, torch.tensor(answering)))


class Answer(NamedTuple):
    """Tokens of one conversation after its image tokens, with what is supervised among them."""

    tokens: list[int]
    supervised: list[bool]
    kind: Kind


class AnswerCollator:
    """
    Pictures to one packed row of conversations each.

    Args:
        conversations_per_image: How many are drawn for a picture, its kinds in `SHARES`; those of equal first questions once.

    Returns (on call): `input_ids`, `position_ids`, `labels` `(images, length)`, labels -100 outside the answers;
    `attention_mask` bool `(images, 1, length, length)`; `decisions` `(questions, 2)`, image and position of the token
    before the one that decides, of the single questions; `refused` bool `(questions,)`; `image_features`.
    """

    def __init__(
        self, processor: MglmmProcessor, feature_cache: FeatureCache, decision: Decision, conversations_per_image: int
    ):
        self.processor, self.feature_cache, self.decision = processor, feature_cache, decision
        self.conversations_per_image = conversations_per_image

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rng = random.Random(int(torch.randint(2**31, ())))  # torch's generator differs from worker to worker
        packed = [self._pack(row["image"], self._drawn(row["conversations"], rng)) for row in rows]
        length = max(len(row["tokens"]) for row in packed)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in packed])

        owner = padded("owners", -1)
        seen = (owner[:, :, None] == owner[:, None]) | (owner[:, None] == 0)
        decisions = [(i, position) for i, row in enumerate(packed) for position, _ in row["decisions"]]
        return {
            "input_ids": padded("tokens", self.processor.tokenizer.pad_token_id),
            "position_ids": padded("positions", 0),
            "labels": padded("labels", -100),
            "attention_mask": (seen & torch.ones(length, length, dtype=torch.bool).tril())[:, None],
            "decisions": torch.tensor(decisions, dtype=torch.long).reshape(-1, 2),
            "refused": torch.tensor([refused for row in packed for _, refused in row["decisions"]], dtype=torch.bool),
            "image_features": self.feature_cache.load([row["image"] for row in rows]),
        }

    def _drawn(self, kinds: Mapping[Kind, list[Any]], rng: random.Random) -> list[tuple[Kind, Any]]:
        """In random order, so that none is always the one that does not fit any more."""
        drawn: list[tuple[Kind, Any]] = []
        for kind, share in SHARES.items():
            pool = {
                messages[0]["content"]: messages
                for messages in rng.sample(kinds.get(kind, []), len(kinds.get(kind, [])))
            }
            wanted = round(share * self.conversations_per_image)
            drawn += [(kind, messages) for messages in list(pool.values())[:wanted]]
        rng.shuffle(drawn)
        return drawn

    def _pack(self, image: Any, conversations: Sequence[tuple[Kind, Any]]) -> dict[str, list[Any]]:
        """Owners: 0 for the shared prefix, k for conversation k."""
        encoded = self.processor.apply_chat_template(
            [conversation_of({"image": image, "messages": messages}) for _, messages in conversations],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"images_kwargs": {"return_pixels": False}},
        )
        first = encoded["input_ids"][0]
        prefix = max(i for i, token in enumerate(first) if token == self.processor.image_token_id) + 1
        row: dict[str, list[Any]] = {
            "tokens": list(first[:prefix]),
            "positions": list(range(prefix)),
            "owners": [0] * prefix,
            "labels": [-100] * prefix,
            "decisions": [],
        }
        own = zip(encoded["input_ids"], encoded["assistant_masks"], conversations, strict=True)
        for number, (tokens, mask, (kind, _)) in enumerate(own, 1):
            answer = Answer(list(tokens[prefix:]), [bool(value) for value in mask[prefix:]], kind)
            start = len(row["tokens"])
            if number > 1 and start + len(answer.tokens) > MAX_PACKED:
                continue
            row["tokens"] += answer.tokens
            row["positions"] += range(prefix, prefix + len(answer.tokens))
            row["owners"] += [number] * len(answer.tokens)
            row["labels"] += [t if s else -100 for t, s in zip(answer.tokens, answer.supervised, strict=True)]
            if kind in ("refused", "answered"):
                begin = answer.supervised.index(True) + len(self.decision.prefix)
                row["decisions"].append((start + begin - 1, kind == "refused"))
        return row


class AnswerWarmup(nn.Module):
    """
    LoRA and image projector of `model` in the form that `Trainer` takes; the rest of it is frozen meanwhile.

    Args:
        decision: Of `deciding_tokens`.
    """

    def __init__(self, model: PeftModel, decision: Decision):
        super().__init__()
        self._models = (model.train(),)  # in a tuple, hence no submodule: checkpoints hold the trained parameters alone
        self.decision = decision
        trained = {
            name.replace(".", "|"): parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and ("lora_" in name or ".multi_modal_projector." in name)
        }
        model.requires_grad_(False)
        self.trained = nn.ParameterDict({name: p.requires_grad_(True) for name, p in trained.items()})

    def forward(
        self,
        input_ids: torch.LongTensor,
        position_ids: torch.LongTensor,
        labels: torch.LongTensor,
        attention_mask: torch.Tensor,
        decisions: torch.LongTensor,
        refused: torch.Tensor,
        image_features: MglmmImageFeatures,
    ) -> dict[str, torch.Tensor]:
        model = cast(MglmmForConditionalGeneration, self._models[0].get_base_model())
        # Padding sees nothing but itself; a finite number keeps even an empty row of scores finite.
        mask = torch.zeros(attention_mask.shape, dtype=model.lm_head.weight.dtype, device=attention_mask.device)
        mask = mask.masked_fill(~attention_mask, torch.finfo(mask.dtype).min)
        hidden = model.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            image_features=image_features,
        ).last_hidden_state
        supervised = labels[:, 1:] != -100
        logits = model.lm_head(hidden[:, :-1][supervised]).float().log_softmax(-1)
        targets = labels[:, 1:][supervised]
        ce_loss = F.nll_loss(logits, targets)
        numbers = torch.full(supervised.shape, -1, device=logits.device)
        numbers[supervised] = torch.arange(len(targets), device=logits.device)
        deciding = logits[numbers[decisions[:, 0], decisions[:, 1]]]
        groups = (self.decision.refusing, self.decision.answering)
        refuse, answer = (deciding[:, group.to(logits.device)].logsumexp(-1) for group in groups)
        losses = F.binary_cross_entropy_with_logits(refuse - answer, refused.float(), reduction="none")
        refusal_loss = 0.5 * (_mean(losses, refused) + _mean(losses, ~refused))
        chosen = (refuse > answer).float()
        return {
            "loss": ce_loss + REFUSAL_WEIGHT * refusal_loss,
            "ce_loss": ce_loss,
            "refusal_loss": refusal_loss,
            "refused_absent": _mean(chosen, refused),
            "refused_present": _mean(chosen, ~refused),
        }


def _mean(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return (values * where).sum() / where.sum().clamp_min(1)
