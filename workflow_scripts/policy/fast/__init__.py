"""Faster passes through the policy: equal prompts and images computed once, decoding with less copying."""
