"""OpenVLA, native to today's Hugging Face ecosystem."""
