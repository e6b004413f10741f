"""The linear models that frozen vectors are judged by, one a kind of label, on features standardised by those fitted
on."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from pretrain.probing.scores import INVERSE_REGULARISATION, logistic_regression

PENALTY = 1.0  # L2, on standardised features: of ridge, scikit-learn's alpha is the number of cases times this


@dataclass(frozen=True)
class LinearModel:
    """Vectors v (n, D) → outputs ``(v − centre) / spread · weights + bias`` (n, K): logits of classes, of two that of
    the second alone; a number; or a risk.

    The weights (D, K) are those with the least mean loss of what they were fitted on, which is
    `pretrain.slide_probing.label_loss`'s, plus ``penalty`` times the sum of their squares.
    """

    centre: np.ndarray  # (D,)
    spread: np.ndarray  # (D,)
    weights: np.ndarray
    bias: np.ndarray  # (K,)
    penalty: float

    def outputs(self, vectors: np.ndarray) -> np.ndarray:
        """(n, D) → (n, K)."""
        return (vectors - self.centre) / self.spread @ self.weights + self.bias


def predicted(kind: str, classes: int, fitted: np.ndarray, values: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """Fit on features ``(n, D)`` and values, predict for ``(m, D)``: shares of ``classes`` (m, classes), numbers (m,),
    or risks (m,)."""
    return told_by(kind, linear_model(kind, classes, fitted, values).outputs(judged))


def told_by(kind: str, outputs: np.ndarray) -> np.ndarray:
    """What ``outputs`` (m, K) of a model predict, as `predicted` has it."""
    if kind != "classes":
        return outputs[:, 0]
    return softmax(outputs if outputs.shape[1] > 1 else np.hstack([np.zeros_like(outputs), outputs]), axis=1)


def linear_model(kind: str, classes: int, vectors: np.ndarray, values: np.ndarray) -> LinearModel:
    """The model of vectors (n, D) and values of one ``kind``, with all ``classes`` among them."""
    if kind == "classes":
        pipeline, _ = logistic_regression(vectors, values)  # 1,000 steps from there on change no rank worth naming
        scaler, model = pipeline[0], pipeline[1]
        assert len(model.classes_) == classes
        weights, bias, penalty = model.coef_.T, model.intercept_, 1 / (2 * len(vectors) * INVERSE_REGULARISATION)
    else:
        scaler = StandardScaler().fit(vectors)
        x = scaler.transform(vectors)
        if kind == "number":
            model = Ridge(alpha=PENALTY * len(x)).fit(x, values)
            weights, bias, penalty = model.coef_[:, None], np.array([model.intercept_]), PENALTY
        else:
            weights, bias, penalty = cox(x, values)[:, None], np.zeros(1), PENALTY / 2
    return LinearModel(scaler.mean_, scaler.scale_, weights, bias, penalty)


def cox(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Weights ``(D,)`` of proportional hazards (Cox 1972), L2-penalised, ties as Breslow has them: the least of

    − 1/n Σ_{i: event} (x_i · β − log Σ_{j: time_j ≥ time_i} exp(x_j · β)) + PENALTY / 2 · |β|²
    """
    order = np.argsort(-values[:, 0], kind="stable")  # the latest first: who is at risk is all before
    x, time, event = x[order], values[order, 0], values[order, 1]
    last = np.searchsorted(-time, -time, side="right") - 1  # of equal times, all are at risk

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        risk = x @ weights
        top = risk.max()
        strength = np.exp(risk - top)
        at_risk, sums = np.cumsum(strength)[last], np.cumsum(strength[:, None] * x, axis=0)[last]
        value = -(event * (risk - top - np.log(at_risk))).sum() / len(x) + PENALTY / 2 * weights @ weights
        slope = -(event[:, None] * (x - sums / at_risk[:, None])).sum(axis=0) / len(x) + PENALTY * weights
        return value, slope

    return minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x
