"""
Second stage of training from fresh parts: the language model learns to look before it answers.

Whether a thing is there is decided by the first token of an answer ("Sure, ..." or "Sorry, ..."), one of some forty that a
joint run supervises, so a small language model learns it last and by chance. Here nothing else is asked: many questions
about one picture share its image tokens (each sees the picture and itself alone, at the positions it would have by
itself), and the loss is the binary cross entropy of refusing, read from the logits of the first token of the answer.
LoRA and the image projector train; ten minutes of it do more than hours of joint training.
"""

from __future__ import annotations

import os
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from torch import nn

from mglmm.modeling_mglmm import MglmmForConditionalGeneration, MglmmImageFeatures
from mglmm.processing import MglmmProcessor
from mglmm.processing.uscdf import IMAGE_TOKEN, SEG_TOKEN

from .feature_cache import FeatureCache

TASKS = ("referring", "absent")
DECISIVE = 3  # times as often before one kind of answer as before the other: then a token decides
OTHER_TOKEN_WEIGHT = 0.2  # of the probability that no deciding token gets


class Question(NamedTuple):
    text: str
    refused: bool


class ImageQuestions(torch.utils.data.Dataset):
    """
    The pictures of USCDF rows with the questions that are asked of each, those answered with a mask and those refused.

    Args:
        rows: Every user turn of the tasks `TASKS` counts as a question of its own.

    Raises `ValueError` if no question is refused, or none is answered.
    """

    def __init__(self, rows: Dataset):
        self.rows = rows
        self.questions: dict[tuple[str, str], list[Question]] = defaultdict(list)
        self.openings: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
        first_row: dict[tuple[str, str], int] = {}
        columns = rows.select_columns(["source", "image_id", "task", "messages"])
        for index, row in enumerate(columns):
            if row["task"] not in TASKS:
                continue
            image = row["source"], row["image_id"]
            first_row.setdefault(image, index)
            contents = [message["content"] for message in row["messages"]]
            for question, answer in zip(contents[::2], contents[1::2], strict=True):
                refused = SEG_TOKEN not in answer
                self.questions[image].append(Question(question.replace(IMAGE_TOKEN, "").strip(), refused))
                self.openings[refused][" ".join(answer.split()[:3])] += 1
        if not (self.openings[True] and self.openings[False]):
            raise ValueError(
                f"{len(rows)} rows hold {self.openings[True].total()} refused and {self.openings[False].total()} "
                "answered questions: the refusal warm-up needs both; leave it out or add rows of absent things"
            )
        self.images = sorted(first_row.items())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, row = self.images[index]
        return {"image": self.rows[row]["image"], "questions": self.questions[image]}


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
        raise ValueError("refusals and answers begin with the same words: the refusal warm-up cannot tell them apart")
    return Decision(prefix, cast(Any, torch.tensor(refusing)), cast(Any, torch.tensor(answering)))


class RefusalCollator:
    """
    Pictures to one packed prompt each.

    Returns (on call): `input_ids`, `position_ids` `(images, length)`; `attention_mask` bool `(images, 1, length, length)`;
    `ends` `(questions, 2)`, image and position of the last token of each question's prompt; `refused` bool `(questions,)`;
    `image_features`.
    """

    def __init__(
        self, processor: MglmmProcessor, feature_cache: FeatureCache, decision: Decision, questions_per_image: int
    ):
        self.processor, self.feature_cache, self.decision = processor, feature_cache, decision
        self.questions_per_image = questions_per_image

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rng = random.Random(int(torch.randint(2**31, ())))  # torch's generator differs from worker to worker
        packed, ends, refused = [], [], []
        for i, row in enumerate(rows):
            kinds = [[q for q in row["questions"] if q.refused is kind] for kind in (True, False)]
            half = self.questions_per_image // 2
            questions = [q for kind in kinds for q in rng.sample(kind, min(len(kind), half))]
            prompts = self._prompts(row["image"], [question.text for question in questions])
            tokens, positions, owners, last = _pack(prompts, self._prefix_length(prompts))
            packed.append((tokens, positions, owners))
            ends += [(i, end) for end in last]
            refused += [question.refused for question in questions]
        length = max(len(tokens) for tokens, _, _ in packed)
        pad = self.processor.tokenizer.pad_token_id
        owner = torch.tensor([o + [-1] * (length - len(o)) for _, _, o in packed])
        seen = (owner[:, :, None] == owner[:, None]) | (owner[:, None] == 0)
        return {
            "input_ids": torch.tensor([t + [pad] * (length - len(t)) for t, _, _ in packed]),
            "position_ids": torch.tensor([p + [0] * (length - len(p)) for _, p, _ in packed]),
            "attention_mask": (seen & torch.ones(length, length, dtype=torch.bool).tril())[:, None],
            "ends": torch.tensor(ends),
            "refused": torch.tensor(refused),
            "image_features": self.feature_cache.load([row["image"] for row in rows]),
        }

    def _prompts(self, image: Any, questions: Sequence[str]) -> list[list[int]]:
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
            for question in questions
        ]
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            processor_kwargs={"images_kwargs": {"return_pixels": False}},
        )
        return [[*prompt, *self.decision.prefix] for prompt in inputs["input_ids"]]

    def _prefix_length(self, prompts: Sequence[Sequence[int]]) -> int:
        """Up to the last image token; what follows is each question's own."""
        image_token, first = self.processor.image_token_id, prompts[0]
        return max(i for i, token in enumerate(first) if token == image_token) + 1


def _pack(prompts: Sequence[list[int]], prefix: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Tokens, positions and owners (0: the shared prefix, k: question k) of one packed row, and where questions end."""
    tokens, positions, owners = prompts[0][:prefix], list(range(prefix)), [0] * prefix
    ends = []
    for k, prompt in enumerate(prompts, 1):
        own = prompt[prefix:]
        tokens += own
        positions += range(prefix, len(prompt))
        owners += [k] * len(own)
        ends.append(len(tokens) - 1)
    return tokens, positions, owners, ends


class RefusalWarmup(nn.Module):
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
        attention_mask: torch.Tensor,
        ends: torch.LongTensor,
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
        logits = model.lm_head(hidden[ends[:, 0], ends[:, 1]]).float().log_softmax(-1)
        groups = (self.decision.refusing, self.decision.answering)
        refuse, answer = (logits[:, group.to(logits.device)].logsumexp(-1) for group in groups)
        losses = F.binary_cross_entropy_with_logits(refuse - answer, refused.float(), reduction="none")
        refusal_loss = 0.5 * (_mean(losses, refused) + _mean(losses, ~refused))
        other = -torch.logaddexp(refuse, answer).mean()
        chosen = (refuse > answer).float()
        return {
            "loss": refusal_loss + OTHER_TOKEN_WEIGHT * other,
            "refusal_loss": refusal_loss,
            "refused_absent": _mean(chosen, refused),
            "refused_present": _mean(chosen, ~refused),
        }


def _mean(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return (values * where).sum() / where.sum().clamp_min(1)
