"""Phrasings of questions and answers, by kind.

Slots: `{x}` is what is asked for, `{p}` the tagged phrases of an answer, `{y}` what is asked for but absent, `{none}` a
clause that denies it ("there is no hat"), `{rest}` a plain list of nouns. Sentences avoid agreement with their slot, so that any number fits.
"""

import random

# One or several things, named with "the": "the hood of the car", "the coat, the shoes and the bag".
DEFINITE_QUESTIONS: tuple[str, ...] = (
    "Segment {x}.",
    "Please segment {x}.",
    "Please segment {x} in this image.",
    "Can you segment {x} in this photo?",
    "Could you please segment {x}?",
    "Outline {x}.",
    "Please outline {x} in the photo.",
    "Mark {x} in the picture.",
    "Mark the pixels that belong to {x}.",
    "Show me {x}.",
    "Show {x} with a mask.",
    "Can you show me {x} in the image?",
    "Highlight {x}.",
    "Highlight {x} in the picture, please.",
    "I need a mask of {x}.",
    "I would like a mask for {x}.",
    "Give me a mask of {x}.",
    "Give me the segmentation of {x}.",
    "Return the mask of {x}.",
    "Cut out {x}.",
    "I want to cut {x} out of this photo.",
    "Select {x}.",
    "Find {x} in the image.",
    "Find {x} and answer with a mask.",
    "Locate {x} in this picture.",
    "Can you locate {x}?",
    "Point out {x}, please.",
    "Where can I see {x}? Reply with a mask.",
    "Tell me which pixels show {x}.",
    "Which region of the image shows {x}?",
    "Which part of the picture is covered by {x}?",
    "Separate {x} from the rest of the picture.",
    "Trace the outline of {x}.",
    "Draw a mask over {x}.",
    "Identify {x} in this photograph.",
    "Let me see the exact shape of {x}.",
    "Would you mark {x} for me?",
    "Help me find {x} in this image.",
)
# Words for the measure of what training has not heard; no other question may begin like one of these.
PARAPHRASES: tuple[str, ...] = (
    "Could you draw around {x}?",
    "Paint over {x} for me.",
    "I'd like {x} isolated from everything else.",
    "Please produce a segmentation map for {x}.",
    "Generate a binary mask covering {x}.",
    "Where exactly in the frame would one find {x}?",
    "My task is to label {x}. What are the pixels?",
    "Compute the region occupied by {x}.",
    "Shade {x} so that the shape can be recognised.",
    "We want to edit {x}. What should be selected?",
    "Kindly delimit {x}.",
    "Lift {x} off the background.",
    "Remove everything except {x}.",
    "Which pixels make up {x}?",
    "Try to spot {x} and fill the shape.",
    "Draw the silhouette of {x}.",
    "Is there a way to extract {x} from this shot?",
    "Use a mask to indicate {x}.",
    "For my collage I need {x} clipped precisely.",
    "Crop away all but {x}.",
    "Indicate the extent of {x}.",
    "Act as a segmentation tool and process {x}.",
    "Assign every pixel of {x} to the foreground.",
    "What would a mask of {x} look like?",
    "Encircle {x} tightly.",
    "Take the photo and single out {x}.",
    "Your job: mask {x}.",
    "Apply image segmentation to {x}.",
)
# Several things in one question.
SEVERAL_QUESTIONS: tuple[str, ...] = (
    "Segment {x}.",
    "Please segment {x}.",
    "Please outline {x}.",
    "Give one mask each for {x}.",
    "Separate {x} from the rest of the picture.",
    "Mark {x}, each with its own mask.",
    "Show me {x}.",
    "Show {x} with separate masks.",
    "I need masks of {x}.",
    "Can you segment {x} in this image?",
    "Could you mark {x} for me?",
    "Find {x} in the picture.",
    "Highlight {x}, one by one.",
    "Where are {x}? Answer with masks.",
    "Return the masks of {x}.",
    "Locate {x} in this photo.",
    "Draw a mask over each of these: {x}.",
    "Cut out {x} separately.",
    "Identify {x} and give a mask for each.",
    "I am looking for {x}.",
    "Point out {x}, please.",
    "Help me find {x} in this photograph.",
    "Give me the segmentation of {x}.",
    "Select {x}.",
)
# A noun without an article, in the style of a search box.
BARE_QUESTIONS: tuple[str, ...] = (
    "{x}",
    "{x}?",
    "{x}, please",
    "segment: {x}",
    "segment {x}",
    "mask: {x}",
    "mask of {x}",
    "find {x}",
    "show {x}",
    "{x} mask",
    "outline {x}",
    "highlight {x}",
    "select {x}",
    "where: {x}",
)
# With an indefinite article: is it there at all?
SEARCH_QUESTIONS: tuple[str, ...] = (
    "Can you see {x} in this picture? Show me with a mask.",
    "Can you find {x} in this photo?",
    "Do you see {x} here? Answer with a mask.",
    "Does this image show {x}? If so, segment it.",
    "Does the photo contain {x}? Mark what you find.",
    "If you see {x}, mark it.",
    "Look for {x} and give me a mask.",
    "I am looking for {x} in this image.",
    "Find {x}.",
    "Segment {x} if you can see any.",
    "Is {x} visible here? Reply with a mask.",
    "Search the picture for {x} and outline what you find.",
)
# Plural nouns do not go with "is" and "it".
SEARCH_QUESTIONS_PLURAL: tuple[str, ...] = (
    "Can you see {x} in this picture? Show me with a mask.",
    "Can you find {x} in this photo?",
    "Do you see {x} here? Answer with a mask.",
    "Does this image show {x}? If so, segment them.",
    "Does the photo contain {x}? Mark what you find.",
    "If you see {x}, mark them.",
    "Look for {x} and give me a mask.",
    "I am looking for {x} in this image.",
    "Find {x}.",
    "Are {x} visible here? Reply with a mask.",
    "Search the picture for {x} and outline what you find.",
    "Are there {x} in the photo? Segment them.",
)
# Later in a conversation.
FOLLOW_UP_QUESTIONS: tuple[str, ...] = (
    "And {x}?",
    "Now {x}.",
    "What about {x}?",
    "Now segment {x}.",
    "Next, mark {x}.",
    "Thanks. And {x}?",
    "Good, now show me {x}.",
    "Also {x}, please.",
    "Then find {x}.",
    "Please do the same for {x}.",
    "Can you also outline {x}?",
    "Great. Now {x}, please.",
)

# The first is by far the commonest: a steady opening is easy to learn and easy to read.
PRESENT_ANSWERS: tuple[str, ...] = (
    "Sure, {p}.",
    "Here you go: {p}.",
    "Of course, {p}.",
    "Certainly, {p}.",
    "Yes, {p}.",
    "Done: {p}.",
    "I found {p}.",
    "I marked {p}.",
    "The mask shows {p}.",
    "{p}.",
)
SEVERAL_ANSWERS: tuple[str, ...] = (
    "Sure, {p}.",
    "Here you go: {p}.",
    "Of course, {p}.",
    "Certainly, {p}.",
    "Done: {p}.",
    "I found {p}.",
    "I marked {p}.",
    "The masks show {p}.",
    "{p}.",
)
ABSENT_ANSWERS: tuple[str, ...] = (
    "Sorry, I cannot find {y} in this picture.",
    "Sorry, I do not see {y} in the image.",
    "I cannot see {y} here.",
    "I looked for {y}, but without success.",
    "Sorry, {none} in this photo.",
    "No, {none} here.",
    "I am afraid {none} in the picture.",
    "As far as I can see, {none} in this image.",
    "Sorry, I could not find {y} anywhere in the photo.",
)
PARTLY_ABSENT_TAILS: tuple[str, ...] = (
    "But I cannot see {y}.",
    "But I could not find {y} in this picture.",
    "I do not see {y}, though.",
    "However, I cannot find {y}.",
    "Sorry, but I see no sign of {y}.",
)

PANOPTIC_QUESTIONS: tuple[str, ...] = (
    "Describe the image and mark everything you mention.",
    "Describe this picture with a mask for every thing you name.",
    "Describe the picture in detail and put a mask after each thing you name.",
    "Describe every object in the picture, with a mask after each mention.",
    "What is in this picture? Please mark everything.",
    "What does this image show? Answer with masks.",
    "What can you see here? Segment each thing.",
    "Tell me what this photo shows and give a mask for each thing.",
    "List everything in the image with its mask.",
    "Segment everything in this image.",
    "Segment all the objects and the background in this photo.",
    "Give a panoptic description of the picture.",
    "Explain this photo and attach masks to the phrases.",
    "Please describe the scene, with masks.",
    "Please describe the whole image and ground each phrase with a mask.",
    "Write a caption; ground every phrase with a mask.",
    "Walk me through this scene and outline what you name.",
    "Which objects are in the picture? Show each of them with a mask.",
    "Name all the things you can see and segment them.",
    "Can you describe this photograph and segment its contents?",
    "Could you tell me what is going on here, with a mask for each object?",
    "I would like a description of this image with masks in it.",
    "Give me an overview of the photo, with one mask for each item.",
    "Look at the whole picture. What is in it? Mark each item.",
)
PANOPTIC_OPENINGS: tuple[str, ...] = (
    "The picture shows {p}.",
    "The image shows {p}.",
    "This photo shows {p}.",
    "In this picture I see {p}.",
    "The photo contains {p}.",
    "One can see {p}.",
    "I can see {p}.",
    "Here I see {p}.",
)
PANOPTIC_MORE: tuple[str, ...] = (
    "It also shows {p}.",
    "I also see {p}.",
    "In addition, one can see {p}.",
    "The rest of the scene is made up of {p}.",
    "Around this I see {p}.",
    "The scene also contains {p}.",
)

FINE_QUESTIONS: tuple[str, ...] = (
    "Describe {x} in detail, with a mask after each part.",
    "Describe {x} in detail and mark every part.",
    "Describe the parts of {x} with masks.",
    "Zoom in on {x} and describe each part with a mask.",
    "Take a closer look at {x} and segment what you name.",
    "Tell me more about {x}, with masks for the details.",
    "Give a fine-grained description of {x}.",
    "Give me a detailed description of {x} with a mask for each part.",
    "Segment all the parts of {x}.",
    "Please segment {x} part by part.",
    "Please list the parts of {x} and outline each one.",
    "Which parts of {x} can you see? Answer with masks.",
    "Which details of {x} are visible? Mark each one.",
    "What can you say about {x}? Put a mask after each detail.",
    "Look closely at {x}. What do you see? Mark it.",
    "Break {x} down into parts and give a mask for each.",
    "Can you describe {x} closely and mask every detail?",
    "Could you go through {x} piece by piece, with masks?",
    "I want to know every detail of {x}, with masks.",
    "Explain how {x} looks and ground each detail with a mask.",
    "Focus on {x}: name each part and mark it.",
    "Show me the details of {x}, each with its own mask.",
    "Write a detailed caption about {x} alone, with masks.",
    "One part at a time, describe {x} with masks.",
)
# Asked about a person, besides the above.
FINE_PERSON_QUESTIONS: tuple[str, ...] = (
    "What does {x} wear? Answer with masks.",
    "Describe what {x} is wearing, with a mask for each item.",
    "Describe the outfit of {x} and mark each piece.",
    "Which clothes does {x} have on? Segment each of them.",
    "Segment the clothes and everything else that you can see of {x}.",
    "List each item that {x} is wearing and outline it.",
)
FINE_PERSON_QUESTIONS_PLURAL = ("Describe the clothes of {x}, with a mask for each item.",)
# A thing and its parts.
FINE_ANSWERS: tuple[str, ...] = (
    "{x} shows {p}.",
    "{x} has {p}.",
    "On {x} I see {p}.",
    "The visible parts of {x} are {p}.",
    "Of {x} one can see {p}.",
)
FINE_ANSWERS_PLURAL = ("{x} show {p}.", "{x} have {p}.", "On {x} I see {p}.", "Of {x} one can see {p}.")
# A person: what is worn first, then what belongs to the body.
WEARS = ("{x} wears {p}.", "{x} is wearing {p}.")
WEARS_PLURAL = ("{x} wear {p}.", "{x} are wearing {p}.")
BODY_AFTER = ("One can also see {p}.", "I can also see {p}.", "Also visible: {p}.")
BODY_ONLY = ("Of {x} one can see {p}.", "I can see {p} of {x}.")

CAPTION_QUESTIONS: tuple[str, ...] = (
    "Describe the image briefly.",
    "Describe this picture in one sentence.",
    "What is in this picture?",
    "What does the photo show?",
    "Give a short caption, without masks.",
    "Write a caption for this photo.",
    "Caption this image.",
    "In a few words, what do you see?",
    "Please summarise the picture.",
    "What is this a photo of?",
    "Tell me briefly what you see, in plain text.",
    "Sum this image up in one sentence.",
    "Give me a one-line description of the picture.",
    "What can be seen here?",
    "Say in a sentence what this photo is about.",
    "How would you caption this picture?",
    "Put the content of the image into a few words.",
    "What is shown here?",
    "Tell me what this picture shows.",
    "I need a short caption for this image.",
    "Please write one plain sentence about the photo.",
    "What am I looking at?",
    "Describe the scene in short.",
    "Give the picture a fitting caption.",
)
CAPTION_ANSWERS: tuple[str, ...] = (
    "A photo of {rest}.",
    "A picture of {rest}.",
    "The photo shows {rest}.",
    "The picture shows {rest}.",
    "This is a photo of {rest}.",
)


def choose(rng: random.Random, templates: tuple[str, ...], *, first: float = 0.0) -> str:
    """One of the templates; with probability `first` the first of them, else any."""
    return templates[0] if rng.random() < first else rng.choice(templates)


def loosen(rng: random.Random, question: str) -> str:
    """The question as a hurried person types it, at times: all in lower case, or without its last punctuation mark."""
    if rng.random() < 0.08:
        question = question.lower()
    if rng.random() < 0.12:
        question = question.rstrip(".?")
    return question


def capitalise(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
