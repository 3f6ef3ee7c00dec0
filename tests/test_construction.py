"""Constructors refuse what does not fit, and name the argument."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import partnewton as pn
from partnewton import rules

PARAMS = {"body": jnp.array([1.0, 2.0])}

WRONG_CALLS = {
    "partition_newton('0.1')": (TypeError, "learning_rate must be a number"),
    "partition_newton(-0.1)": (ValueError, "learning_rate must not be negative"),
    "partition_newton(rule='cubic')": (TypeError, "rule must be a function"),
    "partition_newton(rule=rules.cubic)": (TypeError, "Call it: rule=rules.cubic"),
    "partition_newton(direction=optax.adam)": (TypeError, "direction must be an opt"),
    "partition_newton(average=0.9)": (TypeError, "average must be an optax.Gr"),
    "partition_newton(backtracking='3')": (TypeError, "backtracking must be a numb"),
    "partition_newton(update_interval='3')": (TypeError, "update_interval must be"),
    "paper_newton('0.1')": (TypeError, "learning_rate must be a number"),
    "paper_newton(-0.1)": (ValueError, "learning_rate must not be negative"),
    "paper_newton(rule='cubic')": (TypeError, "rule must be a function"),
    "paper_newton(smoothing='ema')": (TypeError, "smoothing must be an optax.Gr"),
    "scale_by_partition_newton('cubic')": (TypeError, "rule must be a function"),
    "scale_by_partition_newton(average='ema')": (TypeError, "average must be an op"),
    "scale_by_lookback('0.2')": (TypeError, "rate must be a number"),
    "clip_by_parameter_rms('0.1')": (TypeError, "max_ratio must be a number"),
    "clip_by_parameter_rms(0)": (ValueError, "max_ratio must be positive"),
    "directions.skip_nonfinite(optax.adam)": (TypeError, "direction must be an optax"),
    "directions.equilibrated('adam')": (TypeError, "direction must be an optax"),
}


@pytest.mark.parametrize("call", WRONG_CALLS)
def test_a_wrong_argument_is_named_at_construction(call):
    error, message = WRONG_CALLS[call]
    with pytest.raises(error, match=message):
        eval(call, vars(pn) | {"rules": rules, "optax": optax})


@pytest.mark.parametrize("optimizer", [pn.partition_newton, pn.paper_newton])
def test_the_warning_of_a_learning_rate_points_to_the_call(optimizer):
    with pytest.warns(UserWarning, match="not a learning rate like Adam's") as caught:
        optimizer(1e-3)
    assert [x.filename for x in caught] == [__file__]


@pytest.mark.parametrize("optimizer", [pn.partition_newton, pn.paper_newton])
def test_injected_hyperparameters_do_not_warn(optimizer):
    tx = optax.inject_hyperparams(optimizer)(learning_rate=1e-3)
    assert tx.init(PARAMS).hyperparams["learning_rate"] == np.float32(1e-3)
