"""The pages, one blueprint per part of the shop."""

from flask import Blueprint

from . import account, basket, devices, goods, visit

blueprints: tuple[Blueprint, ...] = (
    goods.pages,
    basket.pages,
    account.pages,
    devices.pages,
    visit.pages,
)
