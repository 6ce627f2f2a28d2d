"""Chat templates. Assistant turns are wrapped in `{% generation %}`, so that training can find the supervised tokens."""

_TEXT = (
    "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for item in content if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}{% endif %}{% endmacro %}"
    "{% macro images(content) %}{% if content is not string %}"
    "{% for item in content if item['type'] == 'image' %}<image>\n{% endfor %}{% endif %}{% endmacro %}"
)

# The format of LLaVA v1.5, which LISA, GLaMM and MGLMM were trained with.
LLAVA_V1 = (
    _TEXT
    + "{% if messages[0]['role'] != 'system' %}A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ text(message['content']) }} "
    "{% elif message['role'] == 'user' %}USER: {{ images(message['content']) }}{{ text(message['content']) }} "
    "{% else %}ASSISTANT:{% generation %} {{ text(message['content']) }}{{ eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

# ChatML, for SmolLM2, Qwen and other models that were instruction-tuned with it.
CHATML = (
    _TEXT + "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ text(message['content']) }}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ images(message['content']) }}{{ text(message['content']) }}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
