"""How agents put a chat before a student, as the Jinja template that other programs read."""

_TRANSCRIPT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'developer' %}System{% else %}{{ message['role'] | capitalize }}{% endif %}"
    ": {{ message['content'] }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def template(bos: str | None) -> str:
    """Returns the template of a transcript that the student continues, after the token that begins a text.

    Args:
        bos: text of that token; None for a tokenizer without one.
    """
    return ("" if bos is None else "{{ bos_token }}") + _TRANSCRIPT
