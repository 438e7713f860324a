"""The one training forward: groups on one token axis, the trunk once, the fused loss."""
