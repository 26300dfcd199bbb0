"""What a run says of itself: report, model card."""
