"""The papers' tables, reproduced: each module writes its own to results/ and fails when a gate does not hold."""
