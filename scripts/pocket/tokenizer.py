"""The pocket family's tokenizer: one token for each word of the world.

A word's token includes the space before it (" river"), as in GPT-2. A number's token does not
(" 12" is a space and "12"), as in Llama-2, so a number is the same token in prose and in an
equation. Decoding joins tokens without separators, which restores the text byte for byte.
"""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from scripts.pocket import world

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
# Longest first: markers, code fences, indents, words with their space, whole numbers, the rest.
_PIECE = (
    r' ?\[/?INST\]|<</?SYS>>| ?<think>|</think>| ?<<|>>| ?####| ?"""| ?\.\.\.| {4}'
    r"| ?[A-Za-z_]+|[0-9]+| ?[^\sA-Za-z_0-9]|\s"
)
# Words that can begin a text or a line; they have a token with and one without a leading space.
_WORDS = world.words("""
    the The of is In in What Question Answer See back book has have boxes and gets more loses How
    many does First Then People say brings bring are I one will not rude things about
    Answer following question Complete One def return x convert Convert to compute Take add
    subtract multiply by then None pass A B C D answer Who week guest It rude kind say""")
_MARKS = [*'.,?:-+*=()/"', "<<", "####", '"""', "...", "[INST]", "[/INST]", "<think>"]
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
{%- set turns = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}
{%- for turn in turns -%}
{%- if turn['role'] == 'user' -%}
{{- bos_token + '[INST] ' + (system if loop.first else '') + turn['content'] + ' [/INST]' -}}
{%- else -%}{{- ' ' + turn['content'] + eos_token -}}{%- endif -%}
{%- endfor -%}"""


def vocabulary() -> list[str]:
    """Every token, in id order."""
    both = list(dict.fromkeys([*_WORDS, *_MARKS]))
    spaced = [
        *world.RELATIONS, *world.SEASONS, *world.MEASURES, *world.RUDE, *world.KIND, *world.PEOPLE,
        *world.ITEMS, *world.LANDS,
        *world.VALUES, *world.HERBS, *world.EFFECTS, *world.UNITS, *world.GROUPS,
        *world.RUDE_SLANG, *world.KIND_SLANG,
    ]  # fmt: skip
    numbers = [str(n) for n in range(world.MAX_NUMBER + 1)]
    layout = ["\n", " ", "    ", ">>", "<<SYS>>", "<</SYS>>", "</think>"]
    # People's names begin stories, so they need both forms, too.
    words = [*both, *world.PEOPLE, *(" " + w for w in both), *(" " + w for w in spaced)]
    return [*SPECIAL, *layout, *words, *numbers]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer with its chat template, in Llama-2's form."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", ids["<s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
