"""The models: Megatron's GPT built from a model's shape, frozen models beside the policy, the distributed head."""
