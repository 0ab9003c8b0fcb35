"""The tokenizer and the processor of the demo model, built from the questions it is asked.

A byte-level BPE in the manner of Llama's: ``<s>`` before every text, ``</s>`` after an answer, any
Unicode text encodable. It is trained on generated questions, easy-VQA's questions and a list of
ordinary English words, so the words of a question are whole tokens and other words are a few.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from demo.data import (
    BACKGROUND_WORD,
    COLOR_WORDS,
    DIGIT_WORDS,
    KIND_WORDS,
    SIZE_WORDS,
    easy_vqa,
)
from demo.questions import sample_question
from demo.scenes import PATCH, SIDE, sample_scene

if TYPE_CHECKING:
    from transformers import LlavaProcessor

VOCABULARY_SIZE = 1024
BOS, EOS, PAD, UNKNOWN, IMAGE = "<s>", "</s>", "<pad>", "<unk>", "<image>"
SPECIAL_TOKENS = (UNKNOWN, BOS, EOS, PAD, IMAGE)

# LLaVA-1.5's template as published for transformers, with </s> after an answer as in its training.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}"
    "{{ message['content'] + (eos_token if message['role'] == 'assistant' else ' ') }}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}"
    "{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + (eos_token if message['role'] == 'assistant' else ' ') }}"
    "{% endfor %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

_ENGLISH_WORDS = """
a about above across after again all along also always am among an and animal another any apple are
around as at away baby back bag ball bear because bed before behind below best better between big
bike bird boat book both box boy bread bus but by cake camera can car cat chair child city clock
close cloud coat coffee cold come could cup cut day describe did different do does dog door down
drink each eat eight eye face far fast father find fire first fish five floor flower food foot for
four from front fruit game garden get girl give glass go good grass great ground group hair half
hand happy has hat have he head help her here high him his home horse hot house how hundred I if
image in inside into is it its just key kind kitchen know lamp land large last leaf left leg letter
light like line little long look made make man many map me men middle milk mirror money moon more
morning most mother mountain mouth much music my name near never new next night nine no not note now
of off old on one only open or other our out outside over page paper park part people person phone
photo piece place plane plant plate play please point put question quick rain read ride right river
road rock room round run same sand say school sea seat see seven she shirt shoe short show side sign
six sky sleep smile snow so some something soon stand stop street sun table take tall tell ten than
that the their them then there these they thing this those three through time to today together too
tower town toy train tree truck turn two under up upon us use very view wait walk wall want warm was
water way we wear week well were what wheel when where which while who why wide will wind window
with woman women wood word work world would write year yes yet you young your zero zebra
"""


def _corpus() -> Iterator[str]:
    rng = np.random.default_rng(0)
    words = {*KIND_WORDS, *COLOR_WORDS, *DIGIT_WORDS, *SIZE_WORDS, BACKGROUND_WORD, *_ENGLISH_WORDS.split()}
    for word in sorted(words):
        for _ in range(20):
            yield f" {word}"
    for seed in range(1500):
        scene = sample_scene(seed, "train")
        for _ in range(8):
            question = sample_question(scene, rng)
            if question is not None:
                yield f"USER: \n{question.text} ASSISTANT: {question.answer}"
                if rng.random() < 0.25:  # as a chat's second question
                    yield f"USER: {question.text} ASSISTANT: {question.answer}"
    for _, text, answer in easy_vqa("train").table:
        yield f"USER: \n{text} ASSISTANT: {answer}"
        yield f"USER: \n{text} ASSISTANT: {answer}"


def train_tokenizer() -> Tokenizer:
    """Train the BPE; the same corpus gives the same tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return tokenizer


def build_processor() -> LlavaProcessor:
    """Return the Hugging Face processor: tokenizer, picture preparation, chat template."""
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE},
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def load_processor(directory: Path) -> LlavaProcessor:
    """Load the processor saved in ``directory``."""
    from transformers import LlavaProcessor

    processor: LlavaProcessor = LlavaProcessor.from_pretrained(directory, backend="pil")
    return processor
