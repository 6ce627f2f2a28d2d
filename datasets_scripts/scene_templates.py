"""Phrasings that training rows of labelled masks have beyond `templates`: relations, regions, places.

Slots: `{x}` is a thing, as in `templates`; `{n}` a first mention;
`{p}` tagged phrases.
"""

# How a thing is placed with respect to another one, in the picture.
LEFT, RIGHT, ABOVE, BELOW, BESIDE = "to the left of", "to the right of", "above", "below", "next to"

# What is next to {x} on one side; {r} is one of the words above.
NEIGHBOUR_QUESTIONS: tuple[str, ...] = (
    "What is {r} {x}? Answer with a mask.",
    "What do you see {r} {x}? Show me with a mask.",
    "What can be seen {r} {x}? Segment it.",
    "Segment what is {r} {x}.",
    "Name and mark what is {r} {x}.",
    "Tell me what is {r} {x}, with a mask.",
    "Find out what is {r} {x} and outline it.",
    "Which thing is {r} {x}? Mark it.",
)
# What has the part {x}; {belongs}, {is} and {does} agree with it.
OWNER_QUESTIONS: tuple[str, ...] = (
    "Segment the thing that {x} {belongs} to.",
    "Segment the whole thing that {x} {is} a part of.",
    "What do you see {x} on? Segment all of it.",
    "Show me the whole object with {x}.",
    "Mark the object that has {x}.",
    "Which object {does} {x} belong to? Answer with its mask.",
    "Outline the complete object around {x}.",
    "Give me the object that {x} {belongs} to, all of it.",
)
WEARER_QUESTIONS: tuple[str, ...] = (
    "Segment the one who wears {x}.",
    "Who wears {x}? Answer with a mask.",
    "Who is wearing {x}? Segment the whole person.",
    "Show me whoever has {x} on.",
    "Mark the person with {x}.",
    "Outline the one that {x} {belongs} to.",
    "Find the person in {x} and give me the whole shape.",
    "Whose clothes include {x}? Reply with a mask.",
)
BODY_QUESTIONS: tuple[str, ...] = (
    "Segment the one that {x} {belongs} to.",
    "To whom {does} {x} belong? Answer with a mask.",
    "Mark the whole person with {x}.",
    "Show me the person that {x} {is} a part of.",
    "Outline all of the person and not only {x}.",
    "Whom {does} {x} belong to? Segment the whole person.",
)

# Answers in words to the questions of `phrase_templates.REGION_QUESTIONS`, by number.
REGION_ANSWERS: tuple[str, ...] = ("It is {n}.", "This is {n}.", "The region shows {n}.", "I see {n}.")
REGION_ANSWERS_PLURAL: tuple[str, ...] = ("These are {n}.", "They are {n}.", "The region shows {n}.", "I see {n}.")
# Those that ask for a mask as well; the same answers, with the phrase tagged.
REGION_MASK_QUESTIONS: tuple[str, ...] = (
    "Segment what is inside <region>.",
    "Segment the thing in <region>.",
    "What is in <region>? Answer with a mask.",
    "Give me a mask of what <region> shows.",
    "Mark the pixels of the thing in <region>.",
    "Name what is at <region> and outline it.",
    "Turn the box <region> into a mask.",
    "Show me the exact shape of what is in <region>.",
    "Look at <region> and segment the main thing in it.",
    "What does <region> contain? Segment it.",
    "Cut out what is in <region>.",
    "Please segment <region>.",
)

# Descriptions of a picture, by place.
PLACE_OPENINGS: dict[str, tuple[str, ...]] = {
    "on the left": ("On the left, one can see {p}.", "On the left I see {p}.", "Visible on the left: {p}."),
    "on the right": ("On the right, one can see {p}.", "On the right I see {p}.", "Visible on the right: {p}."),
}
# Descriptions of a thing by its parts, of any number, and of a person by what is worn.
MORE_FINE_ANSWERS = (
    "Looking closely at {x}, I see {p}.",
    "In detail, {x} can be split into {p}.",
    "Here are the parts of {x}: {p}.",
)
MORE_WEARS = ("On {x} I see {p}.", "The outfit of {x}: {p}.", "Looking closely at {x}, I see {p}.")
