"""What a judged checkpoint says on a terminal."""

from pretrain.training.judging import in_words


def test_the_score_comes_first_and_beside_it_what_it_is_compared_with() -> None:
    figures = {"validation_loss": 0.7, "r2_neighbours": 0.25, "shuffled_rise": 1.0, "r2": 0.3125}
    assert in_words(figures, "r2") == "r2 0.312, r2_neighbours 0.25, validation_loss 0.7, shuffled_rise 1"
    assert in_words({"retrieved": 0.5}, "") == "retrieved 0.5"
