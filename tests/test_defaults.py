"""Defaults that are made late."""

import inspect
import sys

from jsonargparse import ArgumentParser

from spo_lightning.algorithms import PPOClipLoss
from spo_lightning.defaults import lazy


class Holder:
    def __init__(self, loss: PPOClipLoss = lazy(PPOClipLoss)) -> None:  # noqa: B008
        self.loss = loss


def test_a_default_shows_its_arguments_and_is_of_the_module_that_wants_it():
    parser = ArgumentParser()
    parser.add_class_arguments(Holder, "holder")
    shown = parser.parse_args([]).as_dict()["holder"]["loss"]
    assert shown["class_path"].endswith("PPOClipLoss") and shown["init_args"]["clip_ratio_low"] == 0.2
    assert type(Holder().loss).__module__ == __name__


def test_the_stack_is_looked_up_as_before():
    lazy(PPOClipLoss)
    assert inspect.stack()[0].frame is sys._getframe()
