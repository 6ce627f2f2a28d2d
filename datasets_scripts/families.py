"""The name of every dataset that `mglmm prepare` knows. Its builder's docstring and module tell the layout it expects."""

from __future__ import annotations

from .builder import UscdfBuilder
from .captions import CocoCaptions, Flickr30kCaptions, LlavaInstruct, NoCaps
from .coco import CocoInstances, CocoPanoptic
from .custom import Custom
from .fine_grained import Dci, Osprey
from .grand import GrandReferring
from .grandf import GrandfFlickr30k, GrandfHuman, GrandfOpenPsg, GrandfRefcocog
from .hierarchical_coco import HierarchicalCoco
from .mgscdata import MgscData
from .parts import Ade20kParts, PacoLvis, PascalPart
from .reasoning import Muse, ReasonSeg
from .refer import GRefCoco, RefClef, RefCoco, RefCocoG, RefCocoPlus
from .regions import Flickr30kEntities, RefcocogRegions, RefcocoPlusRegions, RefcocoRegions, VisualGenomeRegions
from .semantic import Ade20k, CocoStuff, MapillaryVistas

BUILDERS: dict[str, type[UscdfBuilder]] = {
    "photos": HierarchicalCoco,
    "custom": Custom,
    # semantic, parts, panoptic and instances
    "ade20k": Ade20k,
    "cocostuff": CocoStuff,
    "mapillary_vistas": MapillaryVistas,
    "ade20k_parts": Ade20kParts,
    "paco_lvis": PacoLvis,
    "pascal_part": PascalPart,
    "coco_panoptic": CocoPanoptic,
    "coco_instances": CocoInstances,
    # referring and reasoning
    "refclef": RefClef,
    "refcoco": RefCoco,
    "refcoco+": RefCocoPlus,
    "refcocog": RefCocoG,
    "grefcoco": GRefCoco,
    "grand_referring": GrandReferring,
    "reasonseg": ReasonSeg,
    "muse": Muse,
    # captions and conversations without masks
    "coco_captions": CocoCaptions,
    "flickr30k_captions": Flickr30kCaptions,
    "nocaps": NoCaps,
    "llava_instruct": LlavaInstruct,
    # grounded captions
    "grandf_human": GrandfHuman,
    "grandf_openpsg": GrandfOpenPsg,
    "grandf_flickr30k": GrandfFlickr30k,
    "grandf_refcocog": GrandfRefcocog,
    "mgscdata": MgscData,
    "osprey": Osprey,
    "dci": Dci,
    # regions
    "visual_genome_regions": VisualGenomeRegions,
    "refcoco_regions": RefcocoRegions,
    "refcoco+_regions": RefcocoPlusRegions,
    "refcocog_regions": RefcocogRegions,
    "flickr30k_entities": Flickr30kEntities,
}
