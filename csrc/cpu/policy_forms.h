// The policy losses of a token, each with its derivatives. Formulas: rlhf_fast/reference/policy.py.
#pragma once

#include "policy_lanes.h"

namespace {

// What a formula sees. Where a token does not count, all of it is 0 and the ratio anything.
struct Token {
  Vec logprob, advantage;
  Vec old_logprob;  // logprob itself where there is none
  Vec moved;        // logprob - old_logprob
  Vec ratio;        // of the token, or of its sequence
  Vec less_one;     // ratio - 1, without the difference
};

// dloss / dlogprob = direct + by_ratio dratio / dlogprob.
struct Loss {
  Vec loss, direct, by_ratio;
  Mask low, high, far;  // what the metrics count
};

// What all tokens have in common, and what those of a sequence have. Held by value: a store cannot change it.
struct Constants {
  Vec advantage, weight, entropy_weight;  // where they are not per token
  Vec low, high, delta, dual_clip, first, second;
  Vec ratio, dratio;  // of the sequence
  Vec loss, slope;    // kGeoMean: of each of its tokens
};

constexpr int kOnlyClip = -1;  // kClip without delta and dual_clip

template <int kForm>
inline Loss loss_of(const Token& x, const Constants& c, Vec held) {
  const Vec zero = all(0.0f), one = all(1.0f), minus_a = all(-1.0f) * x.advantage;
  const Mask negative = less(x.advantage, zero), positive = less(zero, x.advantage), none{};
  if constexpr (kForm == kOnlyClip) {  // what the clip leaves alone is its gradient
    const Vec bounded = pick(negative, at_least(x.ratio, c.low), at_most(x.ratio, c.high));
    const Mask moves = equal(bounded, x.ratio);
    return {bounded * minus_a, zero, pick(moves, minus_a, zero), negative & ~moves, positive & ~moves, none};
  } else if constexpr (kForm == rlhf::kClip) {
    const Vec open = at_most(x.ratio, c.delta);
    const Vec open_loss = open * minus_a;
    const Vec clip_loss = at_most(at_least(x.ratio, c.low), c.high) * minus_a;
    const Mask clip_wins = less(open_loss, clip_loss);
    const Vec cap = c.dual_clip * minus_a;
    const Vec either = pick(clip_wins, clip_loss, open_loss);
    const Mask capped = negative & less(cap, either);
    // The clipped branch wins strictly only where the ratio left the range, save for a delta inside of it.
    const Mask below = less(x.ratio, c.low), above = less(c.high, x.ratio), free = equal(x.ratio, open);
    const Mask moves = ((free & ~clip_wins) | (clip_wins & ~(below | above))) & ~capped;
    return {pick(capped, cap, either), zero,        pick(moves, minus_a, zero), negative & below,
            positive & above,          (negative & ~free) | capped};
  } else if constexpr (kForm == rlhf::kVanilla) {
    return {minus_a * x.logprob, minus_a, zero, none, none, none};
  } else if constexpr (kForm == rlhf::kCispo) {
    const Vec slope = at_most(at_least(x.ratio, c.low), c.high) * minus_a;
    return {slope * x.logprob, slope, zero, negative & less(x.ratio, c.low), positive & less(c.high, x.ratio), none};
  } else if constexpr (kForm == rlhf::kSapo) {  // 4 / tau sigmoid(u), u = tau (r - 1), and its derivative by r
    const Vec tau = pick(positive, c.first, c.second);
    const Vec minus_u = at_most(at_least(all(-1.0f) * tau * x.less_one, all(kLowest)), all(-kLowest));
    const Vec e = exp_of(minus_u), gate = one / (one + e);
    return {all(4.0f) / tau * gate * minus_a, zero, all(4.0f) * (e * gate) * gate * minus_a, none, none, none};
  } else if constexpr (kForm == rlhf::kKlCov) {
    const Vec h = c.first * held;
    return {fma(h, abs_of(x.moved), x.ratio * minus_a), h * sign_of(x.moved), minus_a, none, none, none};
  } else if constexpr (kForm == rlhf::kDro) {
    const Vec tie = c.first * x.moved;
    return {fma(minus_a, x.logprob, all(0.5f) * tie * x.moved), minus_a + tie, zero, none, none, none};
  } else if constexpr (kForm == rlhf::kDppoTv) {
    const auto probability = [](Vec v) { return exp_of(at_most(at_least(v, all(kLowest)), all(-kLowest))); };
    const Vec distance = abs_of(probability(x.logprob) - probability(x.old_logprob));
    const Mask above = less(c.high, distance) & less(zero, x.moved) & positive;
    const Mask below = less(c.low, distance) & less(x.moved, zero) & ~positive;
    const Vec slope = pick(above | below, zero, at_most(x.ratio, c.first)) * minus_a;
    return {slope * x.logprob, slope, zero, below & negative, above, none};
  } else {  // kGeoMean: the loss is the sequence's
    return {c.loss, zero, c.slope, negative & less(x.moved, c.low), positive & less(c.high, x.moved), none};
  }
}

// kGeoMean's part of a token's log-ratio that counts: clipped on the side where its advantage could run away.
inline Vec kept_log_ratio(Vec moved, Vec advantage, Vec low, Vec high) {
  const Vec zero = all(0.0f);
  const Vec down = pick(less(advantage, zero), at_least(moved, low), zero);
  return pick(less(zero, advantage), at_most(moved, high), down);
}

}  // namespace
