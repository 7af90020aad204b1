"""SiT: a vision transformer whose blocks are modulated by time and label (adaLN-Zero; Peebles & Xie, arXiv 2212.09748).

Shape suffixes: b batch, t tokens, n = b*t, d width, s heads, h head width, f features of a patch. Layers are stacked
on a leading axis and scanned, so compile time does not grow with depth. Tokens are flattened with the batch before
every matmul: one large product instead of b small ones.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sit_jax.errors import unknown_name
from sit_jax.models.attention import einsum
from sit_jax.models.embeddings import patchify, position_embedding, time_features, unpatchify
from sit_jax.models.linear import Linear
from sit_jax.models.sizes import Size, tokens

REMAT_POLICIES = {
    # Gathered weights are gathered again: kept whole for every layer, they would undo what fsdp saves.
    "none": lambda primitive, *_, **__: primitive.name != "custom_vjp_call",
    "dots": jax.checkpoint_policies.save_from_both_policies(  # keeps the outputs of the linear layers and of attention
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("attention"),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
_normal = nn.initializers.normal(0.02)
_zeros = nn.initializers.zeros_init()


def identity(x: Any) -> Any:
    return x


def _norm(x: jax.Array) -> jax.Array:
    """LayerNorm without affine, in float32 whatever the compute dtype."""
    return nn.LayerNorm(
        epsilon=1e-6,
        use_bias=False,
        use_scale=False,
        use_fast_variance=False,
        dtype=jnp.float32,
        parent=None,
    ).apply({}, x)


def _modulate(x_btd: jax.Array, shift_bd: jax.Array, scale_bd: jax.Array, dtype: Any) -> jax.Array:
    return (_norm(x_btd) * (1 + scale_bd[:, None]) + shift_bd[:, None]).astype(dtype)


class Attention(nn.Module):
    heads: int
    qk_norm: bool
    dtype: Any
    attend: Callable

    @nn.compact
    def __call__(self, x_btd: jax.Array) -> jax.Array:
        b, t, d = x_btd.shape
        # Heads are an axis of the kernel, so that a mesh can split them.
        qkv = Linear((3, self.heads, d // self.heads), self.dtype, name="qkv")
        parts_nsh = jnp.unstack(qkv(x_btd.reshape(b * t, d)), axis=1)
        q_bsth, k_bsth, v_bsth = (
            part.reshape(b, t, self.heads, -1).transpose(0, 2, 1, 3) for part in parts_nsh
        )
        if self.qk_norm:  # Dehghani et al. (arXiv 2302.05442): bounds the logits, which bfloat16 training may need
            q_bsth, k_bsth = (
                nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, name=name)(x).astype(self.dtype)
                for x, name in ((q_bsth, "q_norm"), (k_bsth, "k_norm"))
            )
        out_btsh = self.attend(q_bsth, k_bsth, v_bsth).transpose(0, 2, 1, 3)
        out_nd = checkpoint_name(out_btsh.reshape(b * t, d), "attention")
        proj = Linear(d, self.dtype, name="proj")
        return proj(out_nd).reshape(b, t, d)


class Mlp(nn.Module):
    ratio: int
    dtype: Any

    @nn.compact
    def __call__(self, x_btd: jax.Array) -> jax.Array:
        b, t, d = x_btd.shape
        hidden = Linear(self.ratio * d, self.dtype, name="fc1")(x_btd.reshape(b * t, d))
        out = Linear(d, self.dtype, name="fc2")(nn.gelu(hidden, approximate=True))
        return out.reshape(b, t, d)


class Block(nn.Module):
    """One layer, in the (carry, output) form that scan wants. condition_bd is the SiLU of time plus label embedding."""

    heads: int
    mlp_ratio: int
    qk_norm: bool
    dtype: Any
    attend: Callable
    shard: Callable
    split: Callable

    @nn.compact
    def __call__(self, x_btd: jax.Array, condition_bd: jax.Array) -> tuple[jax.Array, None]:
        d = x_btd.shape[-1]
        ada = Linear(6 * d, self.dtype, _zeros, name="adaLN_modulation")
        ada_bd = self.split(ada(condition_bd))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(ada_bd, 6, axis=-1)
        attention = Attention(self.heads, self.qk_norm, self.dtype, self.attend, name="attn")
        x_btd = x_btd + gate1[:, None] * attention(_modulate(x_btd, shift1, scale1, self.dtype))
        mlp = Mlp(self.mlp_ratio, self.dtype, name="mlp")
        x_btd = x_btd + gate2[:, None] * mlp(_modulate(x_btd, shift2, scale2, self.dtype))
        return self.shard(x_btd), None


class TimeEmbedder(nn.Module):
    """[b] -> float32 [b, width], in float32 whatever the compute dtype: t is small differences of one number."""

    width: int

    @nn.compact
    def __call__(self, t_b: jax.Array) -> jax.Array:
        hidden = Linear(self.width, kernel_init=_normal, name="fc1")(time_features(t_b))
        return Linear(self.width, kernel_init=_normal, name="fc2")(nn.silu(hidden))


class FinalLayer(nn.Module):
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x_btd: jax.Array, condition_bd: jax.Array) -> jax.Array:
        b, t, d = x_btd.shape
        ada = Linear(2 * d, self.dtype, _zeros, name="adaLN_modulation")(condition_bd)
        x_btd = _modulate(x_btd, *jnp.split(ada, 2, axis=-1), self.dtype)
        out = Linear(self.features, self.dtype, _zeros, name="linear")(x_btd.reshape(b * t, d))
        return out.reshape(b, t, self.features)


class SiT(nn.Module):
    """(x_bhwc, t_b in [0, 1], y_b int32) -> float32 like x_bhwc: velocity, score or noise, as it was trained.

    The null label is `classes`, the label table's last row. With learn_sigma the last layer has twice the channels
    and only the first half is used, as in the published weights. `gather` maps the parameters of one layer before use,
    `shard` the activations between layers; `replicate`, `broadcast` and `split` say where the condition lies, and what
    the layers make of it. A mesh fills them in.
    """

    size: Size
    input_size: int
    channels: int
    classes: int
    learn_sigma: bool = False
    mlp_ratio: int = 4
    qk_norm: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32
    attend: Callable = einsum
    gather: Callable = identity
    shard: Callable = identity
    replicate: Callable = identity
    broadcast: Callable = identity
    split: Callable = identity

    @nn.compact
    def __call__(self, x_bhwc: jax.Array, t_b: jax.Array, y_b: jax.Array) -> jax.Array:
        width, patch = self.size.width, self.size.patch
        t = tokens(self.input_size, patch)
        patches_btf = patchify(x_bhwc, patch)
        embed = Linear(width, self.dtype, name="x_embedder")
        x_btd = embed(patches_btf.reshape(-1, patches_btf.shape[-1])).reshape(-1, t, width)
        # A parameter because published files hold it; never trained.
        position_td = self.param(
            "pos_embed", lambda _: jnp.asarray(position_embedding(width, self.input_size // patch))
        )
        x_btd = self.shard(x_btd + jax.lax.stop_gradient(position_td).astype(self.dtype))
        labels = nn.Embed(self.classes + 1, width, embedding_init=_normal, name="y_embedder")
        t_b, y_b = self.replicate(t_b), self.replicate(y_b)
        condition_bd = nn.silu(TimeEmbedder(width, name="t_embedder")(t_b) + labels(y_b)).astype(
            self.dtype
        )
        condition_bd = self.broadcast(self.replicate(condition_bd))
        x_btd, _ = self._blocks()(x_btd, condition_bd)
        out_channels = self.channels * (2 if self.learn_sigma else 1)
        out_btf = FinalLayer(patch**2 * out_channels, self.dtype, name="final_layer")(
            x_btd, condition_bd
        )
        return unpatchify(out_btf, patch, out_channels)[..., : self.channels].astype(jnp.float32)

    def _blocks(self) -> nn.Module:
        if self.remat not in REMAT_POLICIES:
            raise unknown_name("remat policy", self.remat, REMAT_POLICIES)
        block = Block
        if not self.is_initializing():  # or the parameters would be stored as gather leaves them
            block = nn.map_variables(block, "params", trans_in_fn=self.gather)
        block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.size.depth,
        )
        hooks = {"attend": self.attend, "shard": self.shard, "split": self.split}
        return stack(
            self.size.heads, self.mlp_ratio, self.qk_norm, self.dtype, **hooks, name="blocks"
        )
