"""How models are spread over ranks: DDP, FSDP, ZeRO."""
