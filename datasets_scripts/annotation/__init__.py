"""
MGSCData by machine: masks of any origin and a vision language model to multi-granularity descriptions with aligned masks.

    masks --mask_tree--> geometry --object_labeling--> labels --label_merge--> tree --dense_context--> contexts --export

Each step is a file of pure functions; what they give for one image is a stage file of its folder (`store`), in the forms
of `records`. `run` leads images through the steps, `chat` is what a step says to a language model of any kind.
"""
