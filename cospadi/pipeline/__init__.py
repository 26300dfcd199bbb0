"""The stages joined: from a dense model to a checkpoint folder, with records that survive interruptions."""
