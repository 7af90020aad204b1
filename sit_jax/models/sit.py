"""SiT: a vision transformer modulated by time and condition.

The modulation is adaLN-Zero (Peebles & Xie, arXiv 2212.09748).

Shape suffixes: b batch, t tokens, n = b*t, d width, s heads, h head width, f features of a patch,
l layers. Layers are stacked on a leading axis and scanned, so compile time does not grow with
depth. Tokens are flattened with the batch before every matmul: one large product instead of b small
ones.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sit_jax.errors import check, unknown_name
from sit_jax.models.attention import KEPT, einsum
from sit_jax.models.conditioning import Condition
from sit_jax.models.elementwise import STATISTICS, gelu, gelu_of_product, modulated_norm
from sit_jax.models.embeddings import (
    lookup,
    patchify,
    position_embedding,
    time_features,
    unpatchify,
)
from sit_jax.models.linear import OPERAND, OUTPUT, Linear, SplitLinear, in_place_of
from sit_jax.models.sizes import Size, tokens


def _is_not_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Save everything for the backward pass except weights that `gather` assembled over fsdp."""
    # jax asks a policy about each primitive whether its outputs may be saved. `gather` of
    # `sharding.model_hooks` is a custom_vjp, whose outputs are one layer's weights, each [i, o...]
    # complete on every device. Saving them in the scan over layers would keep [depth, i, o...]: the
    # memory of a model without fsdp. The backward pass gathers them again instead. (The only other
    # custom_vjp is the `zero` of `linear.affine`, which costs nothing to recompute.)
    return primitive.name != "custom_vjp_call"


# The values saved for the backward pass, which recomputes all others.
REMAT_POLICIES = {
    "none": _is_not_gathered,
    # Outputs of the linear layers, and a mean and a deviation of each token; `remat_policy` adds
    # those of attention. The outputs include the bias, so that no kernel has to add it again.
    "dots": jax.checkpoint_policies.save_only_these_names(OUTPUT, STATISTICS),
    # Also what linear layers and norms take: the backward pass computes only derivatives again.
    "operands": jax.checkpoint_policies.save_only_these_names(OUTPUT, STATISTICS, OPERAND),
    "full": jax.checkpoint_policies.nothing_saveable,
}
_normal = nn.initializers.normal(0.02)
_zeros = nn.initializers.zeros_init()


def remat_policy(name: str, kernel: str) -> Callable:
    """Return the policy of this name for layers with this attention kernel.

    Raises UserError for an unknown name.
    """
    if name not in REMAT_POLICIES:
        raise unknown_name("remat policy", name, REMAT_POLICIES)
    policy = REMAT_POLICIES[name]
    if name not in ("dots", "operands"):
        return policy
    return jax.checkpoint_policies.save_from_both_policies(policy, KEPT[kernel])


def identity(x: Any) -> Any:
    """Return x. The default of every hook, for a network without a mesh."""
    return x


def in_compute_dtype(params: Any, dtype: Any) -> Any:
    """Return the parameters; those that the layers convert at each call are already in `dtype`.

    The output is the same. A sampler calls the network many times with the same parameters.
    """

    def convert(path: Any, leaf: jax.Array) -> jax.Array:
        is_converted = path[-1].key in ("kernel", "bias") and path[0].key != "t_embedder"
        return leaf.astype(dtype) if is_converted else leaf

    return jax.tree_util.tree_map_with_path(convert, params)


class Attention(nn.Module):
    """Self-attention over the tokens: [b, t, d] -> [b, t, d]."""

    heads: int
    qk_norm: bool
    dtype: Any
    attend: Callable

    @nn.compact
    def __call__(self, x_btd: jax.Array) -> jax.Array:
        b, t, d = x_btd.shape
        # The kernel is [d, 3, s, h]: heads are an axis of their own, so that a mesh can split them.
        qkv = SplitLinear((3, self.heads, d // self.heads), self.dtype, name="qkv")
        q_bsth, k_bsth, v_bsth = (
            part.reshape(b, t, self.heads, -1).transpose(0, 2, 1, 3)
            for part in qkv(x_btd.reshape(b * t, d))
        )
        if self.qk_norm:
            # Bound the logits: bfloat16 training may need it (Dehghani et al., arXiv 2302.05442).
            q_bsth, k_bsth = (
                nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, name=name)(x).astype(self.dtype)
                for x, name in ((q_bsth, "q_norm"), (k_bsth, "k_norm"))
            )
        out_btsh = self.attend(q_bsth, k_bsth, v_bsth).transpose(0, 2, 1, 3)
        out_nd = checkpoint_name(out_btsh.reshape(b * t, d), "attention")
        proj = Linear(d, self.dtype, name="proj")
        return proj(out_nd).reshape(b, t, d)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them: [b, t, d] -> [b, t, d].

    With `keep_activated` a remat policy may save the GELU.
    """

    ratio: int
    dtype: Any
    keep_activated: bool = False

    @nn.compact
    def __call__(self, x_btd: jax.Array) -> jax.Array:
        b, t, d = x_btd.shape
        fc1 = Linear(self.ratio * d, self.dtype, named=False, name="fc1")
        fc2 = Linear(d, self.dtype, name="fc2")
        hidden = fc1(x_btd.reshape(b * t, d))
        activated = gelu(checkpoint_name(hidden, OUTPUT))
        in_product = gelu_of_product(hidden, activated)
        if self.keep_activated:
            # One value for the product and for fc2's gradient. Under a policy that does not save
            # it, the backward pass would compute fc1's product again.
            activated = in_place_of(activated, checkpoint_name(in_product, OPERAND))
            return fc2(activated).reshape(b, t, d)
        return fc2(activated, in_product).reshape(b, t, d)


class Block(nn.Module):
    """One layer, in scan's form: (carry, broadcast input) -> (carry, output).

    embedding_bd is the SiLU of the sum of time and condition embedding. The output is None, or with
    `keep_output` the carry.
    """

    heads: int
    mlp_ratio: int
    qk_norm: bool
    dtype: Any
    attend: Callable
    shard: Callable
    split: Callable
    keep_activated: bool = False
    keep_output: bool = False

    @nn.compact
    def __call__(
        self, x_btd: jax.Array, embedding_bd: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        d = x_btd.shape[-1]
        # Shift, scale and gate for each of the two branches. The gates start at 0: a fresh block is
        # the identity.
        ada = Linear(6 * d, self.dtype, _zeros, name="adaLN_modulation")
        ada_bd = self.split(ada(embedding_bd))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(ada_bd, 6, axis=-1)
        attention = Attention(self.heads, self.qk_norm, self.dtype, self.attend, name="attn")
        y_btd = checkpoint_name(modulated_norm(x_btd, shift1, scale1), OPERAND)
        x_btd = checkpoint_name(x_btd + gate1[:, None] * attention(y_btd), OPERAND)
        mlp = Mlp(self.mlp_ratio, self.dtype, self.keep_activated, name="mlp")
        y_btd = checkpoint_name(modulated_norm(x_btd, shift2, scale2), OPERAND)
        x_btd = x_btd + gate2[:, None] * mlp(y_btd)
        x_btd = self.shard(x_btd)
        return x_btd, x_btd if self.keep_output else None


class TimeEmbedder(nn.Module):
    """The embedding of time: [b] -> float32 [b, width].

    Always computed in float32: bfloat16 cannot tell neighbouring times apart.
    """

    width: int

    @nn.compact
    def __call__(self, t_b: jax.Array) -> jax.Array:
        hidden = Linear(self.width, kernel_init=_normal, name="fc1")(time_features(t_b))
        return Linear(self.width, kernel_init=_normal, name="fc2")(nn.silu(hidden))


class LabelEmbedder(nn.Module):
    """The table of label embeddings: int32 [b] -> float32 [b, width]."""

    rows: int
    width: int

    @nn.compact
    def __call__(self, label_b: jax.Array) -> jax.Array:
        return lookup(self.param("embedding", _normal, (self.rows, self.width)), label_b)


class FinalLayer(nn.Module):
    """Modulated norm and projection to patches: [b, t, d] -> [b, t, features]."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x_btd: jax.Array, embedding_bd: jax.Array) -> jax.Array:
        b, t, d = x_btd.shape
        ada_bd = Linear(2 * d, self.dtype, _zeros, name="adaLN_modulation")(embedding_bd)
        shift, scale = jnp.split(ada_bd, 2, axis=-1)
        x_btd = modulated_norm(x_btd, shift, scale)
        out = Linear(self.features, self.dtype, _zeros, name="linear")(x_btd.reshape(b * t, d))
        return out.reshape(b, t, self.features)


class SiT(nn.Module):
    """(x_bhwc, t_b in [0, 1], condition) -> float32 like x_bhwc.

    The output is the velocity, score or noise, whichever the network was trained to predict. The
    condition is an int32 label for each image; the label `classes`, the table's last row, stands
    for no label. With learn_sigma the last layer has twice the channels, of which only the first
    half is used, as in the published weights. `kernel` names the attention that `attend` computes:
    its name in `attention.KERNELS`.

    The layers are scanned, `unroll` of them in each iteration.

    Hooks place values on a mesh; `sharding.model_hooks` supplies them, and without a mesh they are
    the identity. `gather` maps the parameters of one layer before their use, `shard` the
    activations between layers. `replicate` and `broadcast` place the embedding of time and
    condition, `split` each layer's adaLN output.
    """

    size: Size
    input_size: int
    channels: int
    classes: int
    learn_sigma: bool = False
    mlp_ratio: int = 4
    qk_norm: bool = False
    remat: str = "none"
    unroll: int = 1
    dtype: Any = jnp.float32
    kernel: str = "einsum"
    attend: Callable = einsum
    gather: Callable = identity
    shard: Callable = identity
    replicate: Callable = identity
    broadcast: Callable = identity
    split: Callable = identity

    @nn.compact
    def __call__(
        self, x_bhwc: jax.Array, t_b: jax.Array, condition: Condition, layers: Sequence[int] = ()
    ) -> jax.Array | tuple[jax.Array, dict[int, jax.Array]]:
        """Return the output; with `layers`, also {k: tokens_btd after the first k layers}.

        Raises UserError for a layer outside 1 to depth.
        """
        for layer in layers:
            check(
                1 <= layer <= self.size.depth,
                f"layer {layer} does not exist; expected 1 to {self.size.depth}, the model's depth",
            )
        x_btd = self._embed_patches(x_bhwc)
        embedding_bd = self._embed_time_and_condition(t_b, condition)
        # tokens_lbtd is None unless asked for: then the scan does not store it.
        blocks = self._blocks(keep_outputs=bool(layers))
        x_btd, tokens_lbtd = blocks(x_btd, embedding_bd)
        out_bhwc = self._project(x_btd, embedding_bd)
        if not layers:
            return out_bhwc
        return out_bhwc, {layer: tokens_lbtd[layer - 1] for layer in layers}

    def _embed_patches(self, x_bhwc: jax.Array) -> jax.Array:
        """Return the tokens [b, t, d] of the images, with their positions."""
        width = self.size.width
        patch = self.size.patch
        t = tokens(self.input_size, patch)
        patches_btf = patchify(x_bhwc, patch)
        embed = Linear(width, self.dtype, name="x_embedder")
        x_btd = embed(patches_btf.reshape(-1, patches_btf.shape[-1])).reshape(-1, t, width)
        # It is a parameter only because published files hold it; it is never trained.
        position_td = self.param(
            "pos_embed", lambda _: jnp.asarray(position_embedding(width, self.input_size // patch))
        )
        return self.shard(x_btd + jax.lax.stop_gradient(position_td).astype(self.dtype))

    def _embed_time_and_condition(self, t_b: jax.Array, condition: Condition) -> jax.Array:
        """Return the embedding [b, d] that modulates every layer."""
        width = self.size.width
        # This embedder is the only place that knows a condition is a label.
        embed_condition = LabelEmbedder(self.classes + 1, width, name="y_embedder")
        t_b = self.replicate(t_b)
        condition = self.replicate(condition)
        time_bd = TimeEmbedder(width, name="t_embedder")(t_b)
        embedding_bd = nn.silu(time_bd + embed_condition(condition)).astype(self.dtype)
        return self.broadcast(self.replicate(embedding_bd))

    def _blocks(self, keep_outputs: bool) -> Callable:
        """Return the layers as one function, a scan: (x_btd, embedding_bd) -> (x_btd, outputs)."""
        block = Block
        if not self.is_initializing():  # init stores the parameters as they are before `gather`
            block = nn.map_variables(block, "params", trans_in_fn=self.gather)
        # Within a loop nothing can be shared with the forward pass. Where the layers are unrolled,
        # sharing common subexpressions would undo the recomputation.
        block = nn.remat(
            block, policy=remat_policy(self.remat, self.kernel), prevent_cse=self.unroll > 1
        )
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.size.depth,
            unroll=self.unroll,
        )
        return stack(
            self.size.heads,
            self.mlp_ratio,
            self.qk_norm,
            self.dtype,
            attend=self.attend,
            shard=self.shard,
            split=self.split,
            keep_activated=self.remat == "operands",
            keep_output=keep_outputs,
            name="blocks",
        )

    def _project(self, x_btd: jax.Array, embedding_bd: jax.Array) -> jax.Array:
        """Return the output [b, h, w, c] of the last tokens, float32."""
        patch = self.size.patch
        channels = self.channels * (2 if self.learn_sigma else 1)
        layer = FinalLayer(patch**2 * channels, self.dtype, name="final_layer")
        out_bhwc = unpatchify(layer(x_btd, embedding_bd), patch, channels)
        return out_bhwc[..., : self.channels].astype(jnp.float32)
