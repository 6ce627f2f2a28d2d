"""Settings of the annotation pipeline, one dataclass for each step; defaults are those of reference C.2 to C.5."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# Part of the stage files' hashes: raise it when prompts or rules change what an answer becomes.
PROMPT_VERSION = 1


@dataclass(frozen=True)
class GeometryConfig:
    """
    Parameters of filtering:
        min_predicted_iou, min_stability_score: Lower ones are dropped.
        min_area_share, max_area_share: Of the image; outside of them a mask is dropped.
    Parameters of the tree, measured on a grid of `work_long_side` cells along the longer side:
        duplicate_iou: Two masks that overlap so much are one; the better one is kept.
        containment: Share of a mask that must lie in another one to be its part.
        max_child_ratio: Largest area of a part, relative to its whole.
    Parameters of the caps, which keep the largest ones:
        max_level1: Children of the root.
        max_below_level1: Descendants of each of these.
        max_nodes: Of the whole tree.
    """

    min_predicted_iou: float = 0.88
    min_stability_score: float = 0.92
    min_area_share: float = 0.0008
    max_area_share: float = 0.95
    work_long_side: int = 512
    duplicate_iou: float = 0.85
    containment: float = 0.85
    max_child_ratio: float = 0.90
    max_level1: int = 24
    max_below_level1: int = 12
    max_nodes: int = 64


@dataclass(frozen=True)
class LabelingConfig:
    """
    Args:
        objects_per_request: Siblings that one request asks about.
        overview_long_side, crop_long_side: Of the pictures sent, in pixels.
        attempts: Answers that may fail before a request is split.
        max_tokens: Of an answer, for each object.
    """

    objects_per_request: int = 6
    overview_long_side: int = 768
    crop_long_side: int = 384
    attempts: int = 3
    max_tokens: int = 200


@dataclass(frozen=True)
class MergingConfig:
    """
    Args:
        no_merge_labels: Labels whose things stay apart, such as "person".
        merge_level1: Whether children of the root are merged, too.
        collapse_same_as_parent: Remove an only child that has its parent's label and most of its area.
    """

    no_merge_labels: tuple[str, ...] = ()
    merge_level1: bool = True
    collapse_same_as_parent: bool = True


@dataclass(frozen=True)
class ContextConfig:
    """
    Args:
        max_root_targets: Objects that a description of the whole image has to name.
        min_descendants: An object with fewer parts gets no description of its own.
        max_subtrees: Descriptions of single objects, of those with most parts.
        image_long_side: Of the pictures sent, in pixels.
        attempts: Answers that may fail before the description does.
        max_tokens: Of an answer.
        template_fallback: Put a template in the place of a failed description (exported only on request).
    """

    max_root_targets: int = 24
    min_descendants: int = 2
    max_subtrees: int = 3
    image_long_side: int = 1024
    attempts: int = 3
    max_tokens: int = 1200
    template_fallback: bool = False


@dataclass(frozen=True)
class AnnotationConfig:
    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    labeling: LabelingConfig = field(default_factory=LabelingConfig)
    merging: MergingConfig = field(default_factory=MergingConfig)
    context: ContextConfig = field(default_factory=ContextConfig)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AnnotationConfig:
        """From sections of settings, as in a YAML file. Raises `ValueError` that names an unknown one."""
        if not isinstance(values, dict):
            raise ValueError(f"settings are sections such as geometry, not a {type(values).__name__}")
        sections = {}
        for section in fields(cls):
            of_section = values.get(section.name) or {}
            kind: Any = section.default_factory
            if not isinstance(of_section, dict):
                raise ValueError(f"{section.name} is no section of settings: {of_section!r}")
            known = {setting.name: setting for setting in fields(kind)}
            if unknown := [name for name in of_section if name not in known]:
                raise ValueError(f"{section.name}: unknown {', '.join(map(str, unknown))}; known: {', '.join(known)}")
            converted = {name: tuple(v) if isinstance(v, list) else v for name, v in of_section.items()}
            for name, value in converted.items():
                _check(f"{section.name}.{name}", value, getattr(kind(), name))
            sections[section.name] = kind(**converted)
        if unknown := [name for name in values if name not in sections]:
            raise ValueError(f"unknown section {', '.join(map(str, unknown))}; known: {', '.join(sections)}")
        return cls(**sections)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _check(name: str, value: Any, default: Any) -> None:
    """Raises `ValueError` for a setting of another type than its default, or a number that nothing can be done with."""
    if isinstance(default, tuple):
        right = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    else:
        right = type(value) in ((int, float) if type(default) is float else (type(default),))
    if not right:
        kind = "list of names" if isinstance(default, tuple) else type(default).__name__
        raise ValueError(f"{name} is {value!r}, which is no {kind}")
    if type(default) is float and not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}, but must be from 0 to 1")
    if type(default) is int and value < (0 if name.endswith(("max_subtrees", "min_descendants")) else 1):
        raise ValueError(f"{name} is {value!r}, which is too small")


def digest_of(value: Any) -> str:
    """sha256 of a JSON value, the same whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
