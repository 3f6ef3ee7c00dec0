"""Losses that move: games, drifting targets, a curriculum, losses without a minimum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import partnewton as pn

PARAMS = {"a": jnp.array([3.0, -1.0]), "b": jnp.array(2.0)}


@functools.cache
def trained(loss, steps):
    """The parameters, the factor and the learning rates after each step."""
    tx = pn.partition_newton()

    def step(carry, time):
        params, state = carry
        value_fn = functools.partial(loss, time=time)
        grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        params = optax.apply_updates(params, updates)
        seen = params, pn.metrics(state)["factor"], updates, pn.learning_rates(state)
        return (params, state), seen

    times = jnp.arange(steps, dtype=jnp.float32)
    carry = PARAMS, tx.init(PARAMS)
    return jax.jit(lambda c: jax.lax.scan(step, c, times)[1])(carry)


def distance(params):
    return np.sqrt(np.sum(np.asarray(params["a"]) ** 2, -1) + params["b"] ** 2)


def bottomless(params, time):
    """It decreases for ever, and only ever so slightly bent."""
    a, b = params["a"], params["b"]
    return jnp.sum(jax.nn.softplus(-0.01 * a) - 0.01 * a) - 0.01 * b + 0 * time


@pytest.mark.slow
def test_no_step_is_longer_than_what_was_solved_for():
    """With root mean squares of one, a learning rate is the length of a full step."""
    _, factors, updates, rates = trained(bottomless, 300)
    assert np.max(factors) == pytest.approx(5.0)  # times 0.2, the full length
    for name, steps in updates.items():
        squares = np.asarray(steps).reshape(300, -1) ** 2
        lengths = np.sqrt(squares.mean(1))
        assert np.all(lengths <= np.asarray(rates[name]) * (1 + 1e-5))


def drifting(params, time):
    """A bowl whose minimum moves on by 0.01 at each step."""
    target = 0.01 * time
    return jnp.sum((params["a"] - target) ** 2) + 4 * (params["b"] + target) ** 2


def test_a_drifting_target_is_followed():
    params, _, _, _ = trained(drifting, 600)
    targets = 0.01 * np.arange(600)
    late = slice(200, None)
    assert np.abs(params["a"] - targets[:, None])[late].max() < 1.0
    assert np.abs(params["b"] + targets)[late].max() < 1.0


def curriculum(params, time):
    """Three tasks, one after the other, in units a thousand times apart.

    Each batch has a target of its own. Without that the lengths of steps shrink by
    orders of magnitude at the end of a task, and the next one takes long to begin.
    """
    task = (time // 300).astype(int)
    scale = jnp.array([1.0, 1e3, 1e-3])[task]
    target = jnp.array([0.0, 2.0, -2.0])[task] + 0.3 * jnp.sin(9.0 * time)
    x = params["a"] - target
    return scale * (jnp.sum(x**2 + x**4) + (params["b"] - target) ** 2)


@pytest.mark.slow
def test_each_task_of_a_curriculum_is_learnt():
    params, _, _, _ = trained(curriculum, 900)
    for end, target in ((299, 0.0), (599, 2.0), (899, -2.0)):
        np.testing.assert_allclose(params["a"][end], target, atol=0.1)
        np.testing.assert_allclose(params["b"][end], target, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_generator_and_its_critic_find_the_data(seed):
    """A Wasserstein critic with gradient penalty; each has an optimizer of its own."""

    def score(critic, x):
        return (jnp.tanh(x @ critic["w"] + critic["b"]) @ critic["v"])[..., 0]

    def critic_loss(critic, generator, data, noise, mix):
        fakes = generator["mean"] + noise @ generator["scale"]
        between = mix * data + (1 - mix) * fakes
        slopes = jax.vmap(jax.grad(lambda x: score(critic, x)))(between)
        norms = jnp.sqrt(jnp.sum(slopes**2, -1) + 1e-12)
        gap = jnp.mean(score(critic, fakes)) - jnp.mean(score(critic, data))
        return gap + 10 * jnp.mean((norms - 1) ** 2)

    def generator_loss(generator, critic, noise):
        return -jnp.mean(score(critic, generator["mean"] + noise @ generator["scale"]))

    def step(carry, key):
        critic, generator, of_critic, of_generator = carry

        def critic_step(carry, key):
            critic, state = carry
            one, two, three = jax.random.split(key, 3)
            data = 0.5 * jax.random.normal(one, (64, 2))
            noise = jax.random.normal(two, (64, 2))
            mix = jax.random.uniform(three, (64, 1))
            args = {"data": data, "noise": noise, "mix": mix, "generator": generator}
            grads = jax.grad(critic_loss)(critic, **args)
            updates, state = tx.update(
                grads, state, critic, value_fn=critic_loss, **args
            )
            return (optax.apply_updates(critic, updates), state), None

        (critic, of_critic), _ = jax.lax.scan(
            critic_step, (critic, of_critic), jax.random.split(key, 5)
        )
        args = {"critic": critic, "noise": jax.random.normal(key, (64, 2))}
        grads = jax.grad(generator_loss)(generator, **args)
        updates, of_generator = tx.update(
            grads, of_generator, generator, value_fn=generator_loss, **args
        )
        generator = optax.apply_updates(generator, updates)
        return (critic, generator, of_critic, of_generator), generator["mean"]

    tx = pn.partition_newton()
    keys = jax.random.split(jax.random.key(seed), 3)
    critic = {
        "w": jax.random.normal(keys[0], (2, 32)) / np.sqrt(2),
        "b": jnp.zeros(32),
        "v": jax.random.normal(keys[1], (32, 1)) / np.sqrt(32),
    }
    generator = {"mean": jnp.array([1.5, 0.75]), "scale": 0.3 * jnp.eye(2)}
    carry = critic, generator, tx.init(critic), tx.init(generator)
    run = jax.jit(lambda c: jax.lax.scan(step, c, jax.random.split(keys[2], 600))[1])
    distances = np.linalg.norm(run(carry), axis=-1)
    assert distances.max() < 5.0
    assert distances[-100:].mean() < 1.0  # from 1.7
