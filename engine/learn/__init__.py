"""The loop: rewards become credit, credit a loss, the loss a step."""
