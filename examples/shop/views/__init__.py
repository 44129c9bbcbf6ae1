"""The pages, one blueprint per part of the shop."""

from flask import Blueprint

from flask_gsession.pages.admin import admin_blueprint
from flask_gsession.pages.devices import devices_blueprint
from flask_gsession.pages.live import live_blueprint

from .. import accounts
from . import account, basket, confirm, goods, visit

blueprints: tuple[Blueprint, ...] = (
    goods.pages,
    basket.pages,
    account.pages,
    confirm.pages,
    devices_blueprint(sign_in_view="account.sign_in", base="page.html"),
    admin_blueprint(accounts.runs_the_shop, base="page.html"),
    live_blueprint(keys=["cart"], user_keys=["cart"]),
    visit.pages,
)
