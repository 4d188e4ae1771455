"""FLAME: models composed of protocols, each with observe, policy and transition (paper, section 3)."""
