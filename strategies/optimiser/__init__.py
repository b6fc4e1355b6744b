"""Strategies that change how weights move: utilities, masks, averages, schedules."""
