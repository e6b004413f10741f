"""A slide encoder's own network with random weights: what its architecture gives without training."""

from copy import deepcopy
from dataclasses import replace

from models.initialise import initialise
from models.slide_network import SlideNetwork
from pretrain.encoders.frozen import fingerprint
from pretrain.encoders.slide_encoders import SlideEncoder


def with_random_weights(encoder: SlideEncoder, seed: int) -> SlideNetwork:
    """The encoder's network with random weights, whose residual branches start at full strength: at the small start
    that training may have chosen it would hand its input through."""
    network = deepcopy(encoder.network)
    network.initial_residual = 1.0
    initialise(network, seed, "encoder")
    return network


def random_encoder(encoder: SlideEncoder, seed: int) -> SlideEncoder:
    """The same as an encoder of its own name and hash."""
    network = with_random_weights(encoder, seed)
    name = f"{encoder.name} with random weights, seed {seed}"
    return replace(encoder, network=network, name=name, hash=fingerprint(network), notes=[])
