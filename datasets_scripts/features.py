"""The one schema that every prepared dataset shares, so that any of them can be interleaved with any other."""

from datasets import Features, Image, List, Value

FEATURES = Features(
    {
        "image": Image(),
        "image_id": Value("string"),
        "source": Value("string"),
        "task": Value("string"),
        "messages": List({"role": Value("string"), "content": Value("string")}),
        # COCO compressed RLE, row-major size (height, width), in the order of the [SEG]s of the assistant turns.
        "masks": List({"size": List(Value("int32"), length=2), "counts": Value("string")}),
        # x1, y1, x2, y2 in pixels of the original image, in the order of the <region>s.
        "regions": List(List(Value("float32"), length=4)),
        # Pixels that nobody labelled, as one more RLE; null where every pixel counts.
        "ignore_mask": {"size": List(Value("int32"), length=2), "counts": Value("string")},
    }
)
