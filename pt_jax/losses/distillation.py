"""Losses that make a student's distribution that of a teacher, from the logits or hidden states of both.

    ============================  ===============================================================================
    published as                  here
    ============================  ===============================================================================
    soft targets, Hinton 2015     ``forward_kl``; it is times temperature^2 there, to stand beside a likelihood
    sequence-level KD, Kim 2016   ``likelihood.nll`` on what the teacher wrote
    MiniLLM, GKD, DistiLLM, ...   ``reverse_kl``, ``generalized_jsd``, on what the student wrote
    teacher's top-k logits        ``top_k_renormalised``, ``top_k_with_tail``
    SDPO, SDFT: full              ``generalized_jsd``; the teacher is the model itself that has read more
    SDPO: top-k                   the same two with ``support=students_top``
    SDPO: sampled tokens          ``on_policy_distillation.sampled_reverse_kl``, with ``clipped_importance``
    ============================  ===============================================================================

A survey: Xu et al. 2024, https://arxiv.org/abs/2402.13116.

The teacher has no gradient, whoever it is. Row t of logits speaks of token t + 1, as a model gives them; all else is
[B, T] and speaks of its own token. Which texts, the teacher's or the student's, is a matter of the batch. For a
vocabulary too large for logits [B, T, V], ``from_hidden`` takes any of the losses through in pieces.
"""

import numbers

import jax
import jax.numpy as jnp

from pt_jax import checks, divergences, weights
from pt_jax.logps import align, over_columns


def _at_temperature(logits, teacher_logits, mask, temperature):
    """Both divided by the temperature; 0 where the token after is not scored, and no gradient into the teacher."""
    checks.shapes(logits=(logits, "B T V"), teacher_logits=(teacher_logits, "B T V"), mask=(mask, "B T"))
    checks.positive("temperature", temperature)
    logits, teacher_logits = checks.floats(logits=logits, teacher_logits=teacher_logits)
    exists = jnp.pad(jnp.asarray(mask)[:, 1:, None], ((0, 0), (0, 1), (0, 0)))
    logits, teacher_logits = weights.zero_unscored(exists, logits, jax.lax.stop_gradient(teacher_logits))
    return logits / temperature, teacher_logits / temperature


def forward_kl(logits, teacher_logits, mask, *, temperature=1.0):
    """KL(teacher || student), a token: the student must be able to do all that the teacher does.

        loss = sum_v t_v (log t_v - log s_v),   s = softmax(logits / temperature),   t likewise of the teacher

    Its gradient in logits is (s - t) / temperature. It is the cross-entropy with soft targets, less the teacher's
    entropy. Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2, without their factor temperature^2.

    Args:
      logits: [B, T, V] of the student; row t speaks of token t + 1.
      teacher_logits: [B, T, V] of the teacher, over the same vocabulary; no gradient flows into it.
      mask: [B, T] bool, the scored tokens.
      temperature: > 0, of both.

    Returns:
      [B, T] float32, in nats; 0 where not scored, and for the first token. Infinite where s_v = 0 < t_v.

    Raises:
      ValueError: the shapes disagree, the logits are whole numbers, or the temperature is out of range.

    >>> student, teacher = jnp.log(jnp.array([[[[0.5, 0.5], [1, 1]]], [[[1.0, 0.0], [1, 1]]]]))
    >>> print(forward_kl(student, teacher, jnp.array([[False, True]])).round(4))  # log 2
    [[0. 0.6931]]
    """
    return divergences.kl_from_reference(*_at_temperature(logits, teacher_logits, mask, temperature), mask)


def reverse_kl(logits, teacher_logits, mask, *, temperature=1.0):
    """KL(student || teacher), a token: the student must not do what the teacher does not.

        loss = sum_v s_v (log s_v - log t_v),   s = softmax(logits / temperature),   t likewise of the teacher

    Gu et al. 2023 (MiniLLM), https://arxiv.org/abs/2306.08543, equation 1, for one token at a prefix that the student
    wrote. Arguments as ``forward_kl``; infinite where t_v = 0 < s_v.

    >>> student, teacher = jnp.log(jnp.array([[[[1.0, 0.0], [1, 1]]], [[[0.5, 0.5], [1, 1]]]]))
    >>> print(reverse_kl(student, teacher, jnp.array([[False, True]])).round(4))  # log 2
    [[0. 0.6931]]
    """
    return divergences.kl_to_reference(*_at_temperature(logits, teacher_logits, mask, temperature), mask)


def generalized_jsd(logits, teacher_logits, mask, *, beta=0.5, temperature=1.0):
    """The divergence of GKD, a token: from the teacher and from the student to their mixture.

        m = beta t + (1 - beta) s
        loss = beta KL(t || m) + (1 - beta) KL(s || m)   for 0 < beta < 1

    and ``forward_kl`` for beta = 0, ``reverse_kl`` for beta = 1. Agarwal et al. 2023 (GKD),
    https://arxiv.org/abs/2306.13649, equation 1; ``divergences.generalized_jsd`` without a gradient into the teacher.
    Other arguments as ``forward_kl``.

    Args:
      beta: in [0, 1], the share of the teacher in the mixture.

    >>> student, teacher = jnp.log(jnp.array([[[[1.0, 0.0], [1, 1]]], [[[0.0, 1.0], [1, 1]]]]))
    >>> print(generalized_jsd(student, teacher, jnp.array([[False, True]])).round(4))  # nothing in common: log 2
    [[0. 0.6931]]
    """
    both = _at_temperature(logits, teacher_logits, mask, temperature)
    return divergences.generalized_jsd(*both, mask, beta=beta)


# ---- on a part of the vocabulary


def _likeliest(z, k):
    """[..., V] bool: the k largest; of equals, those that come first."""
    if isinstance(k, numbers.Integral):
        some = jax.lax.top_k(z, min(k, z.shape[-1]))[1]
        return jnp.put_along_axis(jnp.zeros(z.shape, bool), some, True, axis=-1, inplace=False)
    return jnp.argsort(jnp.argsort(z, axis=-1, descending=True), axis=-1) < k  # a traced k: by rank


def teachers_top(logits, teacher_logits, k):
    """A ``support``: the k tokens likeliest for the teacher, kept = (rank of teacher_logits) < k.

    Args:
      logits: [..., V] of the student.
      teacher_logits: [..., V] of the teacher.
      k: > 0.

    Returns:
      [..., V] bool, the tokens that are kept.

    >>> print(teachers_top(jnp.zeros(3), jnp.array([2.0, 1.0, 3.0]), 2))
    [ True False  True]
    """
    return _likeliest(teacher_logits, k)


def students_top(logits, teacher_logits, k):
    """A ``support``: the k tokens likeliest for the student, kept = (rank of logits) < k; see ``teachers_top``.

    >>> print(students_top(jnp.array([2.0, 1.0, 3.0]), jnp.zeros(3), 2))
    [ True False  True]
    """
    return _likeliest(logits, k)


def eithers_top(logits, teacher_logits, k):
    """A ``support``: the k likeliest of each, each token once: kept = teachers_top | students_top.

    >>> print(eithers_top(jnp.array([2.0, 1.0, 3.0]), jnp.array([1.0, 2.0, 3.0]), 2))
    [ True  True  True]
    """
    return _likeliest(teacher_logits, k) | _likeliest(logits, k)


def top_k_renormalised(
    logits, teacher_logits, mask, *, k=100, temperature=1.0, divergence=forward_kl, support=teachers_top
):
    """A divergence between the two distributions given that the token is among a few.

        loss = divergence(s given S, t given S),   s given S = s_v / sum_{u in S} s_u   for v in S

    What happens outside is nobody's concern: with k = 1 the loss is 0, whatever the student does. Hübotter et al. 2026
    (SDPO), https://arxiv.org/abs/2601.20802, take S from the student. Other arguments as ``forward_kl``.

    Args:
      k: > 0, how many tokens; a whole number takes less time than one that is traced.
      divergence: (logits, teacher_logits, mask) -> [B, T], such as ``functools.partial(generalized_jsd, beta=0.5)``.
      support: (logits, teacher_logits, k) -> [B, T, V] bool, the tokens S.

    >>> student, teacher = jnp.log(jnp.array([[[[0.4, 0.4, 0.2], [1, 1, 1]]], [[[0.6, 0.4, 0.0], [1, 1, 1]]]]))
    >>> print(top_k_renormalised(student, teacher, jnp.array([[False, True]]), k=1))
    [[0. 0.]]
    """
    checks.positive("k", k)
    z, t = _at_temperature(logits, teacher_logits, mask, temperature)
    kept = support(z, t, k)
    return divergence(jnp.where(kept, z, -jnp.inf), jnp.where(kept, t, -jnp.inf), mask)


def _with_tail(z, kept):
    """The kept logits, -inf for the others, and one more logit in which the others are together."""
    others = jnp.where(kept, -jnp.inf, z)
    none = jnp.isneginf(others).all(-1, keepdims=True)  # the logsumexp of nothing has a gradient of NaN
    tail = jnp.where(none, -jnp.inf, jax.nn.logsumexp(jnp.where(none, 0, others), -1, keepdims=True))
    return jnp.concatenate([jnp.where(kept, z, -jnp.inf), tail], -1)


def top_k_with_tail(
    logits, teacher_logits, mask, *, k=100, temperature=1.0, divergence=forward_kl, support=teachers_top
):
    """A divergence between the two distributions over a few tokens and "another one".

        loss = divergence((s_S, 1 - sum_S s), (t_S, 1 - sum_S t))

    Never more than the divergence over the whole vocabulary, and the same when all tokens are kept. The probability of
    the others is summed up, not taken as a difference from 1, so that it keeps its digits. Arguments as
    ``top_k_renormalised``. Hübotter et al. 2026 (SDPO), https://arxiv.org/abs/2601.20802.

    >>> student, teacher = jnp.log(jnp.array([[[[0.5, 0.4, 0.1], [1, 1, 1]]], [[[1.0, 0.0, 0.0], [1, 1, 1]]]]))
    >>> print(top_k_with_tail(student, teacher, jnp.array([[False, True]]), k=1).round(4))  # log 2
    [[0. 0.6931]]
    """
    checks.positive("k", k)
    z, t = _at_temperature(logits, teacher_logits, mask, temperature)
    kept = support(z, t, k)
    return divergence(_with_tail(z, kept), _with_tail(t, kept), mask)


# ---- without the logits


def _as_they_are(logits):
    return logits


def from_hidden(
    hidden,
    unembed,
    teacher_hidden,
    teacher_unembed,
    mask,
    *,
    divergence=forward_kl,
    head=_as_they_are,
    teacher_head=_as_they_are,
    chunk=32,
):
    """Any loss of this module from hidden states, with the logits of ``chunk`` columns in memory instead of all.

        loss = divergence(hidden @ unembed.T, teacher_hidden @ teacher_unembed.T, mask)

    The value and the gradient are those of the right side; the columns are projected once more for the gradient.

    Args:
      hidden: [B, T, D] last hidden states of the student, after the final norm; row t speaks of token t + 1.
      unembed: [V, D] of the student; products are taken in the type of ``hidden``, sums and gradients in float32.
      teacher_hidden: [B, T, E] of the teacher, of any width; no gradient flows into it.
      teacher_unembed: [V, E] of the teacher.
      mask: [B, T] bool, the scored tokens.
      divergence: (logits, teacher_logits, mask) -> [B, T], each token on its own. Options are bound beforehand:
        ``functools.partial(generalized_jsd, beta=0.1, temperature=2.0)``.
      head: what comes between the product and the logits: soft cap, scale, bias.
      teacher_head: the same of the teacher.
      chunk: columns at a time.

    Returns:
      [B, T] float32, as ``divergence`` gives it.

    Raises:
      ValueError: the shapes disagree, or an array is of whole numbers.

    >>> hidden = jnp.log(jnp.array([[[2.0], [1.0]]]))
    >>> student, teacher = jnp.array([[0.0], [0.0]]), jnp.array([[1.0], [0.0]])
    >>> loss = from_hidden(hidden, student, hidden, teacher, jnp.array([[False, True]]))
    >>> print(loss.round(4))  # KL of 2/3, 1/3 from 1/2, 1/2
    [[0. 0.0566]]
    """
    checks.shapes(
        hidden=(hidden, "B T D"),
        unembed=(unembed, "V D"),
        teacher_hidden=(teacher_hidden, "B T E"),
        teacher_unembed=(teacher_unembed, "V E"),
        mask=(mask, "B T"),
    )
    checks.floats(hidden=hidden, unembed=unembed, teacher_hidden=teacher_hidden, teacher_unembed=teacher_unembed)
    checks.positive("chunk", chunk)
    teacher_hidden, teacher_unembed = jax.lax.stop_gradient((jnp.asarray(teacher_hidden), jnp.asarray(teacher_unembed)))
    project, teacher_project = _projection(jnp.asarray(unembed)), _projection(teacher_unembed)
    exists = jnp.asarray(mask)[:, 1:]
    rows = weights.zero_unscored(exists[..., None], jnp.asarray(hidden)[:, :-1], teacher_hidden[:, :-1])

    def score(hidden, teacher_hidden, mask):
        # One row more, which predicts nothing, and one token more, which nothing predicts: a little batch of its own
        hidden, teacher_hidden = (jnp.pad(x, ((0, 0), (0, 1), (0, 0))) for x in (hidden, teacher_hidden))
        logits, teacher_logits = head(project(hidden)), teacher_head(teacher_project(teacher_hidden))
        return divergence(logits, teacher_logits, jnp.pad(mask, ((0, 0), (1, 0))))[:, 1:]

    return align(over_columns(score, *rows, exists, chunk=chunk))


def _projection(unembed):
    """hidden -> logits, in float32 at least; the gradient of ``unembed`` is summed over the chunks in that type."""
    wide = unembed.astype(jnp.promote_types(unembed.dtype, jnp.float32))

    def project(hidden):
        out = jnp.promote_types(hidden.dtype, wide.dtype)
        return jnp.einsum("btd,vd->btv", hidden, wide.astype(hidden.dtype), preferred_element_type=out)

    return project
