"""Embedded tasks: endless plain English with an exact verifier, so that every claim can be checked."""

from streamsynth.tasks.worlds.catalogue import (
    STREAM_WORLDS,
    STREAMS,
    TUNING_WORLDS,
    content_hash,
    corpus,
    length_of,
    load_task,
    pretrain_world,
    stream_world,
    world_task,
)
from streamsynth.tasks.worlds.drawing import Difficulty
from streamsynth.tasks.worlds.grammar import Frame, Label, World

__all__ = [
    "STREAMS",
    "STREAM_WORLDS",
    "TUNING_WORLDS",
    "Difficulty",
    "Frame",
    "Label",
    "World",
    "content_hash",
    "corpus",
    "length_of",
    "load_task",
    "pretrain_world",
    "stream_world",
    "world_task",
]
