"""A policy that has to remember: a cue at the first step of an episode says which way to turn at the last.

Between the two the corridor looks the same everywhere, and has a random length. Many corridors run side by side, so
episodes end at different steps of a rollout: `resets` says where, and the whole rollout is one call of the layer when
it is learnt from. With resets at every step the same policy has no memory, and is right as often as a guess.

    python examples/recurrent_policy.py         # 16 s of one core
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from tqdm import tqdm

import lstm_ext

STEPS, CORRIDORS, UNITS = 32, 64, 32
State = tuple[Tensor, Tensor]


class Corridors:
    """B corridors of 4 to 12 steps.

    Seen are the cue (-1 or 1, at the first step only), and whether a step is the first or the last.
    The reward is 1 or -1 at the last step, and 0 before.
    """

    def __init__(self) -> None:
        self.left = torch.zeros(CORRIDORS, dtype=torch.int64)  # steps to the end
        self.cue = torch.zeros(CORRIDORS)
        self.new = torch.ones(CORRIDORS, dtype=torch.bool)  # a new episode begins
        self.begin()

    def begin(self) -> None:
        self.left = torch.where(self.new, torch.randint(3, 12, (CORRIDORS,)), self.left)
        self.cue = torch.where(self.new, torch.randint(0, 2, (CORRIDORS,)) * 2.0 - 1, self.cue)

    def look(self) -> Tensor:
        """What the policy sees: [B, 3]."""
        return torch.stack([self.cue * self.new, self.new.float(), (self.left == 0).float()], 1)

    def turn(self, actions: Tensor) -> Tensor:
        """One step on; returns the rewards [B]."""
        rewards = torch.where(self.left == 0, (actions * 2.0 - 1) * self.cue, 0.0)
        self.new = self.left == 0
        self.left = self.left - 1
        self.begin()
        return rewards


class Policy(nn.Module):
    """An LSTM, the scores of the two actions, and the value that is expected."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = lstm_ext.LSTM(3, UNITS)
        self.head = nn.Linear(UNITS, 3)

    def forward(self, seen: Tensor, state: State, resets: Tensor) -> tuple[Categorical, Tensor, State]:
        y, state = self.lstm(seen, state, resets=resets)
        scores, values = self.head(y).split([2, 1], -1)
        return Categorical(logits=scores), values.squeeze(-1), state


@torch.no_grad()
def roll_out(policy: Policy, corridors: Corridors, state: State, memory: bool) -> tuple[list[Tensor], State]:
    """Acts for some steps: what was seen, resets, actions, rewards and ends, each [T, B, …]."""
    steps = []
    for _ in range(STEPS):
        seen, resets = corridors.look(), corridors.new | (not memory)
        choice, _, state = policy(seen[None], state, resets[None])
        actions = choice.sample()[0]
        steps.append((seen, resets, actions, corridors.turn(actions), corridors.new))
    return [torch.stack(column) for column in zip(*steps, strict=True)], state


def train(rollouts: int, memory: bool) -> float:
    """Actor and critic; returns the share of right turns in the last quarter of the rollouts."""
    torch.manual_seed(0)
    policy, corridors = Policy(), Corridors()
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    state: State = (torch.zeros(1, CORRIDORS, UNITS), torch.zeros(1, CORRIDORS, UNITS))
    right = ends = 0.0
    for n in tqdm(range(rollouts), unit="rollout", desc="with memory" if memory else "without", disable=None):
        first_state = state
        (seen, resets, actions, rewards, done), state = roll_out(policy, corridors, state, memory)
        choice, values, _ = policy(seen, first_state, resets)  # all steps at once, now with gradients
        returns, following = torch.zeros_like(rewards), values[-1].detach()
        for t in reversed(range(STEPS)):
            following = rewards[t] + 0.95 * torch.where(done[t], 0.0, following)
            returns[t] = following
        advantages = returns - values
        policy_loss = -(choice.log_prob(actions) * advantages.detach()).mean()
        loss = policy_loss + 0.5 * advantages.square().mean() - 0.01 * choice.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()
        if n >= rollouts * 3 // 4:
            right += (rewards > 0).sum().item()
            ends += (rewards != 0).sum().item()
    return right / ends


def main(argv: Sequence[str] | None = None) -> dict[bool, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=400, help=f"of {STEPS} steps each; default: 400")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # layers this small are not worth more
    shares = {memory: train(arguments.rollouts, memory) for memory in (True, False)}
    print("policy                       right turns")
    print(f"with memory                  {shares[True]:10.1%}")
    print(f"reset at every step          {shares[False]:10.1%}")
    return shares


if __name__ == "__main__":
    main()
