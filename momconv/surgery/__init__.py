"""From plain networks to momentum networks."""
