"""The linear models that frozen vectors are judged by, one a kind of label, on features standardised by those fitted
on."""

import numpy as np
from scipy.optimize import minimize
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from pretrain.probing.scores import logistic_regression

PENALTY = 1.0  # L2, on standardised features: of ridge, scikit-learn's alpha is the number of cases times this


def predicted(kind: str, classes: int, fitted: np.ndarray, values: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """Fit on features ``(n, D)`` and values, predict for ``(m, D)``: shares of ``classes`` (m, classes), numbers (m,),
    or risks (m,)."""
    if kind == "classes":
        model, _ = logistic_regression(fitted, values)  # 1,000 steps from there on change no rank worth naming
        shares = np.zeros((len(judged), classes))
        shares[:, model.classes_] = model.predict_proba(judged)
        return shares
    scaler = StandardScaler().fit(fitted)
    x, z = scaler.transform(fitted), scaler.transform(judged)
    if kind == "number":
        return Ridge(alpha=PENALTY * len(x)).fit(x, values).predict(z)
    return z @ cox(x, values)


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
