"""VLMo in float64 numpy, written from its formulas: the second opinion that every other implementation is measured by.

It takes a state dict of official names (see official.py) and shares no code with vlmo_fast. Padded positions are
computed like any other, as the official code does; only as keys are they masked.

Shapes: B batch, T text positions, P image tokens (CLS first, then N x N patches), S = T, P or T + P, D hidden size,
H heads, d = D / H, L layers, v first vision-language layer, A rows of the relative table, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.interpolate import RectBivariateSpline
from scipy.special import erf

Array = np.ndarray[Any, np.dtype[Any]]

PATCH_SIZE = 16
BLOCK_EPS = 1e-6  # norm1, norm2_*
FINAL_EPS = 1e-6  # transformer.norm
BERT_EPS = 1e-12  # text embedding
MLM_EPS = 1e-12  # MLM head
HEAD_EPS = 1e-5  # VQA and NLVR2 heads


class Unimodal(NamedTuple):
    """infer_image or infer_text; S is P or T."""

    feats: Array  # (B, S, D) after the final norm
    cls_feats: Array  # (B, D) unit length, modality expert in all layers
    cls_vlffn_feats: Array | None  # (B, D) unit length, VL expert in layers >= v; None on the fine-tuning paths
    raw_cls_feats: Array  # (B, D) before the final norm
    hidden_cls: Array  # (B, calls, D) token 0 after layers 0..L-1, then after the VL branch's layers v..L-1


class Joint(NamedTuple):
    """infer: text and image in one sequence."""

    text_feats: Array  # (B, T, D) after the final norm
    image_feats: Array  # (B, P, D) after the final norm
    cls_feats: Array  # (B, D) pooled text CLS
    raw_cls_feats: Array  # (B, D) text CLS after the final norm
    hidden_cls: Array  # (B, L, D)


class ContrastiveLoss(NamedTuple):
    loss: Array
    i2t_logits: Array  # (B, B), row = image; its transpose is t2i


# Elementary functions


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * weight + bias


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def logsumexp(x: Array) -> Array:
    top = x.max(axis=-1, keepdims=True)
    return np.log(np.exp(x - top).sum(axis=-1)) + top[..., 0]


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# Relative positions: [query, key] -> row of the table


def image_index(n: int) -> Array:
    """(P, P) for n patches per side."""
    y, x = np.divmod(np.arange(n * n), n)
    dy = y[:, None] - y[None, :] + n - 1
    dx = x[:, None] - x[None, :] + n - 1
    end = (2 * n - 1) ** 2 + 3
    index = np.empty((n * n + 1, n * n + 1), np.int64)
    index[1:, 1:] = dy * (2 * n - 1) + dx
    index[0, 1:] = end - 3
    index[1:, 0] = end - 2
    index[0, 0] = end - 1
    return index


def text_index(length: int, n: int, init_text_len: int = 196) -> Array:
    """(T, T). The sign is key minus query, the opposite of the image's."""
    start = (2 * n - 1) ** 2 + 3 + 2  # after the image's and the two cross-modal rows
    end = start + 2 * init_text_len
    p = np.arange(length)
    index = start + (init_text_len - 2) + (p[None, :] - p[:, None])
    index[0, 1:] = end - 3
    index[1:, 0] = end - 2
    index[0, 0] = end - 1
    return index


def joint_index(length: int, n: int, init_text_len: int = 196) -> Array:
    """(T + P, T + P), text first."""
    text_to_image = (2 * n - 1) ** 2 + 3
    size = length + n * n + 1
    index = np.empty((size, size), np.int64)
    index[:length, :length] = text_index(length, n, init_text_len)
    index[length:, length:] = image_index(n)
    index[:length, length:] = text_to_image
    index[length:, :length] = text_to_image + 1
    return index


class Oracle:
    """VLMo of any size and task; what the state dict lacks (experts, heads, positions) the model lacks."""

    def __init__(self, state: Mapping[str, Array], num_heads: int, init_text_len: int = 196) -> None:
        self.state = state
        self.num_heads = num_heads
        self.init_text_len = init_text_len
        self.num_layers = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("transformer.blocks."))
        vl = [int(k.split(".")[2]) for k in state if k.endswith("mlp_vl.fc1.weight")]
        self.first_vl_layer = min(vl, default=self.num_layers)
        self.relative = "relative_position_bias_table" in state
        if self.relative:
            window = len(state["relative_position_bias_table"]) - 5 - 2 * init_text_len  # (2 N - 1)^2
            self.num_patches = (round(window**0.5) + 1) // 2
        else:
            self.num_patches = round((state["transformer.pos_embed"].shape[1] - 1) ** 0.5)

    def p(self, name: str) -> Array:
        return np.asarray(self.state[name], np.float64)

    def linear(self, x: Array, name: str) -> Array:
        """x W^T + b; no b where the checkpoint has none."""
        rows = x.reshape(-1, x.shape[-1])  # one large product; numpy would do one per sequence
        y = (rows @ self.p(f"{name}.weight").T).reshape(*x.shape[:-1], -1)
        return y + self.p(f"{name}.bias") if f"{name}.bias" in self.state else y

    def norm(self, x: Array, name: str, eps: float) -> Array:
        return layer_norm(x, self.p(f"{name}.weight"), self.p(f"{name}.bias"), eps)

    # Embeddings

    def embed_text(self, ids: Array) -> Array:
        words = self.state["text_embeddings.word_embeddings.weight"][ids].astype(np.float64)  # (B, T, D)
        e = words + self.p("text_embeddings.token_type_embeddings.weight")[0]
        if not self.relative:
            e = e + self.p("text_embeddings.position_embeddings.weight")[: ids.shape[1]]
        e = self.norm(e, "text_embeddings.LayerNorm", BERT_EPS)
        return e + self.p("token_type_embeddings.weight")[0]

    def embed_image(self, pixels: Array, token_type: int = 1) -> Array:
        batch, channels, height, _ = pixels.shape
        n, s = height // PATCH_SIZE, PATCH_SIZE
        tiles = pixels.astype(np.float64).reshape(batch, channels, n, s, n, s)
        patches = tiles.transpose(0, 2, 4, 1, 3, 5).reshape(batch, n * n, channels * s * s)
        weight = self.p("transformer.patch_embed.proj.weight")  # (D, 3, 16, 16)
        x = patches @ weight.reshape(len(weight), -1).T + self.p("transformer.patch_embed.proj.bias")
        cls = np.broadcast_to(self.p("transformer.cls_token"), (batch, 1, x.shape[-1]))
        x = np.concatenate([cls, x], axis=1)  # (B, P, D)
        if not self.relative:
            x = x + self.p("transformer.pos_embed")
        return x + self.p("token_type_embeddings.weight")[token_type]

    # Blocks

    def bias(self, layer: int, index: Array) -> Array | float:
        """(H, S, S), or 0 without relative positions."""
        if not self.relative:
            return 0.0
        columns = slice(layer * self.num_heads, (layer + 1) * self.num_heads)
        return self.p("relative_position_bias_table")[:, columns][index].transpose(2, 0, 1)

    def attention(self, x: Array, layer: int, index: Array, mask: Array) -> Array:
        """x (B, S, D) after norm1, mask (B, S) of the keys."""
        block = f"transformer.blocks.{layer}.attn"
        batch, length, hidden = x.shape
        q, k, v = np.split(self.linear(x, f"{block}.qkv"), 3, axis=-1)
        q = q + self.p(f"{block}.q_bias")
        v = v + self.p(f"{block}.v_bias")
        q, k, v = (y.reshape(batch, length, self.num_heads, -1).swapaxes(1, 2) for y in (q, k, v))  # (B, H, S, d)
        scores = (q / np.sqrt(hidden / self.num_heads)) @ k.swapaxes(2, 3) + self.bias(layer, index)  # (B, H, S, S)
        scores = np.where(mask[:, None, None, :] == 1, scores, -np.inf)
        out = (softmax(scores) @ v).swapaxes(1, 2).reshape(batch, length, hidden)
        return self.linear(out, f"{block}.proj")

    def ffn(self, x: Array, layer: int, expert: str) -> Array:
        """The norm and the FFN of one expert: text, imag or vl."""
        block = f"transformer.blocks.{layer}"
        h = self.norm(x, f"{block}.norm2_{expert}", BLOCK_EPS)
        h = gelu(self.linear(h, f"{block}.mlp_{expert}.fc1"))
        return self.linear(h, f"{block}.mlp_{expert}.fc2")

    def split_ffn(self, x: Array, layer: int, text_len: int) -> Array:
        text = self.ffn(x[:, :text_len], layer, "text")
        image = self.ffn(x[:, text_len:], layer, "imag")
        return np.concatenate([text, image], axis=1)

    def block(self, x: Array, layer: int, route: str, index: Array, mask: Array, text_len: int = 0) -> Array:
        """route: text, imag, vl, or split (the first text_len tokens to the text expert, the rest to the image's)."""
        name = f"transformer.blocks.{layer}"
        scaled = f"{name}.gamma_1" in self.state
        gamma_1, gamma_2 = (self.p(f"{name}.gamma_1"), self.p(f"{name}.gamma_2")) if scaled else (1.0, 1.0)
        h = self.norm(x, f"{name}.norm1", BLOCK_EPS)
        x = x + gamma_1 * self.attention(h, layer, index, mask)
        y = self.split_ffn(x, layer, text_len) if route == "split" else self.ffn(x, layer, route)
        return x + gamma_2 * y

    def final_norm(self, x: Array) -> Array:
        return self.norm(x, "transformer.norm", FINAL_EPS)

    # Paths

    def unimodal(self, x: Array, route: str, index: Array, mask: Array, modality: str, vl_branch: bool) -> Unimodal:
        cls, branch = [], x  # branch becomes the input of layer v
        for layer in range(self.num_layers):
            x = self.block(x, layer, route, index, mask)
            cls.append(x[:, 0])
            if layer == self.first_vl_layer - 1:
                branch = x
        feats = self.final_norm(x)
        project = self.p(f"itc_{modality}_proj.fc.weight")
        cls_feats = unit(feats[:, 0] @ project.T)
        cls_vlffn_feats = None
        if vl_branch:
            for layer in range(self.first_vl_layer, self.num_layers):
                branch = self.block(branch, layer, "vl", index, mask)
                cls.append(branch[:, 0])
            vl_project = self.p(f"itc_vl_{modality}_proj.fc.weight")
            cls_vlffn_feats = unit(self.final_norm(branch)[:, 0] @ vl_project.T)
        return Unimodal(feats, cls_feats, cls_vlffn_feats, x[:, 0], np.stack(cls, axis=1))

    def infer_image(self, pixels: Array, *, vl_branch: bool = True) -> Unimodal:
        """pixels (B, 3, 16 N, 16 N)."""
        x = self.embed_image(pixels)
        index, mask = image_index(self.num_patches), np.ones(x.shape[:2])
        return self.unimodal(x, "imag", index, mask, "image", vl_branch)

    def infer_text(self, ids: Array, masks: Array, *, vl_branch: bool = True) -> Unimodal:
        """ids and masks (B, T)."""
        index = text_index(ids.shape[1], self.num_patches, self.init_text_len)
        return self.unimodal(self.embed_text(ids), "text", index, masks, "text", vl_branch)

    def infer_image_ft(self, pixels: Array) -> Unimodal:
        return self.infer_image(pixels, vl_branch=False)

    def infer_text_ft(self, ids: Array, masks: Array) -> Unimodal:
        return self.infer_text(ids, masks, vl_branch=False)

    def infer_text_mlm(self, ids: Array, masks: Array) -> Array:
        """text_feats (B, T, D) of a text-only model."""
        x = self.embed_text(ids)
        index = text_index(ids.shape[1], self.num_patches, self.init_text_len)
        for layer in range(self.num_layers):
            x = self.block(x, layer, "text", index, masks)
        return self.final_norm(x)

    def infer(self, pixels: Array, ids: Array, masks: Array, *, image_token_type: int = 1) -> Joint:
        """The joint path; image_token_type is 2 for NLVR2's second image."""
        text, image = self.embed_text(ids), self.embed_image(pixels, image_token_type)
        t = text.shape[1]
        x = np.concatenate([text, image], axis=1)
        mask = np.concatenate([masks, np.ones(image.shape[:2])], axis=1)
        index = joint_index(t, self.num_patches, self.init_text_len)
        cls = []
        for layer in range(self.num_layers):
            route = "split" if layer < self.first_vl_layer else "vl"
            x = self.block(x, layer, route, index, mask, text_len=t)
            cls.append(x[:, 0])
        x = self.final_norm(x)
        return Joint(x[:, :t], x[:, t:], self.pool(x[:, 0]), x[:, 0], np.stack(cls, axis=1))

    def pool(self, cls: Array) -> Array:
        return np.tanh(self.linear(cls, "pooler.dense"))

    # Heads

    def mlm_logits(self, feats: Array) -> Array:
        """feats (..., D) -> (..., V). The decoder is not tied to the word embeddings."""
        h = gelu(self.linear(feats, "mlm_score.transform.dense"))
        h = self.norm(h, "mlm_score.transform.LayerNorm", MLM_EPS)
        return h @ self.p("mlm_score.decoder.weight").T + self.p("mlm_score.bias")

    def itm_logits(self, cls_feats: Array) -> Array:
        """(B, D) -> (B, 2); class 1 = matching."""
        return self.linear(cls_feats, "itm_score.fc")

    def vqa_logits(self, cls_feats: Array) -> Array:
        """(B, D) -> (B, 3129)."""
        return self.classifier(cls_feats, "vqa_classifier")

    def nlvr2_logits(self, cls_feats_1: Array, cls_feats_2: Array) -> Array:
        """Twice (B, D) -> (B, 2)."""
        return self.classifier(np.concatenate([cls_feats_1, cls_feats_2], axis=-1), "nlvr2_classifier")

    def classifier(self, x: Array, name: str) -> Array:
        h = self.norm(self.linear(x, f"{name}.0"), f"{name}.1", HEAD_EPS)
        return self.linear(gelu(h), f"{name}.3")

    # Losses that need the model

    def itc_loss(self, image: Unimodal, text: Unimodal) -> tuple[Array, ContrastiveLoss, ContrastiveLoss]:
        """Total, plain and VL-branch contrastive losses; each of the latter has its own learned scale."""
        assert image.cls_vlffn_feats is not None
        assert text.cls_vlffn_feats is not None
        base = contrastive_loss(image.cls_feats, text.cls_feats, self.p("logit_scale"))
        vl = contrastive_loss(image.cls_vlffn_feats, text.cls_vlffn_feats, self.p("logit_vl_scale"))
        return (base.loss + vl.loss) / 2, base, vl

    def itm_pair_logits(
        self, pixels: Array, ids: Array, masks: Array, image_neg: Sequence[int] | Array, text_neg: Sequence[int] | Array
    ) -> Array:
        """(3 B, 2): (text, image), then (text, its negative image), then (image's negative text, image)."""
        own = np.arange(len(ids))
        text = np.concatenate([own, own, text_neg])
        image = np.concatenate([own, image_neg, own])
        return self.itm_logits(self.infer(pixels[image], ids[text], masks[text]).cls_feats)

    def pretrain_loss(
        self,
        pixels: Array,
        ids: Array,
        masks: Array,
        ids_mlm: Array,
        labels: Array,
        image_neg: Sequence[int] | Array,
        text_neg: Sequence[int] | Array,
    ) -> Array:
        """0.25 MLM + ITC + ITM with given negatives."""
        masked = labels != -100
        feats = self.infer(pixels, ids_mlm, masks).text_feats[masked]  # (labelled tokens, D)
        mlm = mlm_loss(self.mlm_logits(feats), labels[masked])
        itc, _, _ = self.itc_loss(self.infer_image(pixels), self.infer_text(ids, masks))
        itm = itm_loss(self.itm_pair_logits(pixels, ids, masks, image_neg, text_neg))
        return 0.25 * mlm + itc + itm


# Losses and scores


def cross_entropy(logits: Array, labels: Sequence[int] | Array) -> Array:
    """Mean over rows of logits (R, C)."""
    rows = np.arange(len(logits))
    return (logsumexp(logits) - logits[rows, np.asarray(labels)]).mean()


def mlm_loss(logits: Array, labels: Array) -> Array:
    """logits (..., V), labels (...) with -100 where there is none. Pre-training adds a quarter of it."""
    masked = labels != -100
    return cross_entropy(logits[masked], labels[masked])


def contrastive_loss(image_feats: Array, text_feats: Array, log_scale: Array) -> ContrastiveLoss:
    """Unit features (B, D); partners are on the diagonal."""
    logits = np.exp(log_scale) * image_feats @ text_feats.T
    labels = np.arange(len(logits))
    return ContrastiveLoss((cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2, logits)


def hard_negative_weights(logits: Array) -> Array:
    """Sampling weights of negatives, (B, B): of texts from i2t logits, of images from t2i logits."""
    weights = softmax(logits)
    np.fill_diagonal(weights, 0)
    return weights


def itm_loss(logits: Array) -> Array:
    """logits (3 B, 2), one positive third before two negative ones."""
    return cross_entropy(logits, np.repeat([1, 0, 0], len(logits) // 3))


def vqa_loss(logits: Array, targets: Array) -> Array:
    """Mean binary cross entropy times the number of answers; both (B, 3129)."""
    bce = np.logaddexp(0, logits) - targets * logits
    return bce.mean() * logits.shape[-1]


def vqa_score(logits: Array, targets: Array) -> float:
    """Sum over rows of the target score of the chosen answer."""
    return float(targets[np.arange(len(logits)), logits.argmax(axis=-1)].sum())


# Retrieval: scores (images, texts), image_of (texts,)


def retrieval_scores(image_cls_feats: Array, text_cls_feats: Array) -> Array:
    """Dual encoder: no logit scale, no VL branch."""
    return image_cls_feats @ text_cls_feats.T


def recalls(scores: Array, image_of: Array, k: int) -> tuple[float, float]:
    """(IR@k, TR@k)."""
    own = image_of[None, :] == np.arange(len(scores))[:, None]  # (images, texts)
    image_hit = (own & _among_best(scores.T, k).T).any(axis=0)  # (texts,)
    text_hit = (own & _among_best(scores, k)).any(axis=1)  # (images,)
    return float(image_hit.mean()), float(text_hit.mean())


def reranked(scores: Array, itm: Array, k: int) -> tuple[Array, Array]:
    """Scores to rank texts per image, and images per text, both (images, texts).

    itm (images, texts) holds the class-1 logit of each pair; only the k best candidates keep theirs.
    """
    per_image = np.where(_among_best(scores, k), itm, -100.0) + scores
    per_text = np.where(_among_best(scores.T, k).T, itm, -100.0) + scores
    return per_image, per_text


def _among_best(scores: Array, k: int) -> Array:
    """Mask of the k largest of each row."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, best, True, axis=1)
    return mask


# Resolution change


def geometric_ratio(src: int, dst: int) -> float:
    """q, for src and dst patches per side: the last midpoint of the bisection."""
    n, m = (2 * src - 1) // 2, (2 * dst - 1) // 2
    left, right = 1.01, 1.5
    q = left
    while right - left > 1e-6:
        q = (left + right) / 2
        if (1 - q**n) / (1 - q) > m:
            right = q
        else:
            left = q
    return q


def resize_table(table: Array, src: int, dst: int) -> Array:
    """Relative table (A, C) from src to dst patches per side: a spline on a geometric grid; other rows are kept."""
    side, n, m = 2 * src - 1, (2 * src - 1) // 2, (2 * dst - 1) // 2
    steps = np.cumsum(geometric_ratio(src, dst) ** np.arange(n))  # 1, 1 + q, ...
    x = np.concatenate([-steps[::-1], [0.0], steps])  # (side,)
    t = np.clip(np.arange(-m, m + 1.0), x[0], x[-1])
    grids = table[: side**2].astype(np.float64).T.reshape(-1, side, side)  # (C, side, side)
    resized = [RectBivariateSpline(x, x, grid)(t, t).ravel() for grid in grids]
    return np.concatenate([np.stack(resized, axis=1), table[side**2 :]])


def bicubic_matrix(src: int, dst: int) -> Array:
    """(dst, src) weights along one axis: a = -0.75, align_corners false, no antialiasing, border repeated."""

    def kernel(d: Array) -> Array:
        a, d = -0.75, np.abs(d)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        return np.where(d <= 1, near, np.where(d < 2, far, 0.0))

    matrix = np.zeros((dst, src))
    centre = (np.arange(dst) + 0.5) * src / dst - 0.5
    for tap in range(-1, 3):
        position = np.floor(centre) + tap
        column = np.clip(position, 0, src - 1).astype(int)
        np.add.at(matrix, (np.arange(dst), column), kernel(centre - position))
    return matrix


def resize_positions(pos_embed: Array, src: int, dst: int) -> Array:
    """Absolute positions (1, 1 + src^2, D) -> (1, 1 + dst^2, D); the CLS row is kept."""
    grid = pos_embed[0, 1:].astype(np.float64).reshape(src, src, -1)
    matrix = bicubic_matrix(src, dst)
    resized = np.einsum("yi,xj,ijd->yxd", matrix, matrix, grid).reshape(1, dst * dst, -1)
    return np.concatenate([pos_embed[:, :1], resized], axis=1)
