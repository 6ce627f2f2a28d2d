"""Chat templates. Assistant turns are wrapped in `{% generation %}`, so that training can find the supervised tokens."""


def _macros(image: str = "<image>\n") -> str:
    """`text(content)` and `images(content)`, which writes `image` for each picture of a turn."""
    return (
        "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}"
        "{% for item in content if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}{% endif %}{% endmacro %}"
        "{% macro images(content) %}{% if content is not string %}"
        "{% for item in content if item['type'] == 'image' %}" + image + "{% endfor %}{% endif %}{% endmacro %}"
    )


def _llava_v1(image: str) -> str:
    return (
        _macros(image)
        + "{% if messages[0]['role'] != 'system' %}A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions. {% endif %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ text(message['content']) }} "
        "{% elif message['role'] == 'user' %}USER: {{ images(message['content']) }}{{ text(message['content']) }} "
        "{% else %}ASSISTANT:{% generation %} {{ text(message['content']) }}{{ eos_token }}{% endgeneration %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


_MARKED_IMAGE = "<im_start><image><im_end>"

# The format of LLaVA v1.5, which LISA, GLaMM and MGLMM were trained with.
LLAVA_V1 = _llava_v1("<image>\n")
# How LISA and GLaMM (MGLMM, too) introduce the picture in it: published weights depend on each character.
LISA_V1 = _llava_v1(f"{_MARKED_IMAGE}\n")
GLAMM_V1 = _llava_v1(f"The {_MARKED_IMAGE} provides an overview of the picture.\n")

# The format of Llama 2, which LISA-13B-llama2 was trained with. The tokenizer writes the first `<s>`.
LISA_LLAMA_2 = (
    _macros(f"{_MARKED_IMAGE}\n") + "{% if messages[0]['role'] == 'system' %}"
    "{% set system = text(messages[0]['content']) %}{% set messages = messages[1:] %}{% else %}"
    "{% set system = 'You are a helpful language and vision assistant. You are able to understand the visual content that "
    "the user provides, and assist the user with a variety of tasks using natural language.' %}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% if not loop.first %}{{ bos_token }}{% endif %}"
    "{{ '[INST] ' }}{% if loop.first %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ images(message['content']) }}{{ text(message['content']) }} [/INST]"
    "{% else %}{% generation %} {{ text(message['content']) }} {{ eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)

# ChatML, for SmolLM2, Qwen and other models that were instruction-tuned with it.
CHATML = (
    _macros() + "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ text(message['content']) }}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ images(message['content']) }}{{ text(message['content']) }}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
